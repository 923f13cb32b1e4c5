"""A run in Python: draws, summaries, refusals, and the prior under another channel."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffem_core.channel import RandomMask
from diffem_core.physics_channels import jpeg, super_resolution
from pipelines.using.run import Run, open_run
from storage_schemas.config import RandomMatrixChannel
from tests.pipelines.used_run import observed, run, used  # noqa: F401

pytestmark = pytest.mark.usefixtures("prefect_server")


def test_the_package_stays_light_until_a_run_is_opened() -> None:
    code = (
        "import sys, pipelines\n"
        "assert 'open_run' in pipelines.__all__\n"
        "assert not {'torch', 'prefect', 'zarr', 'pydantic'} & set(sys.modules)\n"
        "from pipelines import open_run\n"
        "assert 'torch' in sys.modules and 'prefect' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_draws_have_their_own_seeds_whatever_else_is_drawn(run: Run) -> None:  # noqa: F811
    given = observed(run, 5)
    y, params = given["y"], {"mask": given["mask"]}
    posterior = run.posterior()
    draws = posterior.sample(y, params, draws=3, seed=1)
    assert draws.shape == (3, 5, 1, 8, 8)
    # The same to rounding in other batches, as fewer draws, alone, and as tensors.
    torch.testing.assert_close(
        draws, posterior.sample(y, params, draws=3, seed=1, batch_size=2), atol=1e-3, rtol=0
    )
    few = posterior.sample(torch.from_numpy(y), params, draws=2, seed=1)
    torch.testing.assert_close(draws[:2], few, atol=1e-3, rtol=0)
    alone = posterior.sample(y[3:4], {"mask": params["mask"][3:4]}, draws=3, seed=1, numbers=[3])
    torch.testing.assert_close(draws[:, 3:4], alone, atol=1e-3, rtol=0)
    # One observation under two numbers is drawn twice, not copied.
    twice = posterior.sample(y[[3, 3]], {"mask": params["mask"][[3, 3]]}, draws=3, seed=1)
    assert (twice[:, 0] - twice[:, 1]).abs().mean() > 0.1
    # Other draws, observations' numbers and seeds are other noise: grey levels apart, not 1e-3.
    assert (draws[0] - draws[1]).abs().mean() > 0.1
    assert (posterior.sample(y, params, draws=3, seed=2) - draws).abs().mean() > 0.1
    assert (posterior.sample(y, params, draws=3, seed=1, steps=6) - draws).abs().mean() > 0.1


def test_the_posterior_is_that_of_the_iteration_that_was_named(run: Run) -> None:  # noqa: F811
    given = observed(run, 4)
    y, params = given["y"], {"mask": given["mask"]}
    assert [manifest.iteration for manifest in run.iterations] == [0, 1]
    assert run.status().complete == 2
    last, first = run.posterior(), run.posterior(-2)
    assert (last.iteration, first.iteration) == (1, 0)
    assert last.model_digest == run.iterations[1].model_digest
    same = run.posterior(0).sample(y, params, draws=2)
    torch.testing.assert_close(same, first.sample(y, params, draws=2), atol=0, rtol=0)
    assert (same - last.sample(y, params, draws=2)).abs().max() > 1e-3


def test_a_summary_is_that_of_the_draws(run: Run) -> None:  # noqa: F811
    given = observed(run, 4)
    y, params = given["y"], {"mask": given["mask"]}
    draws = run.posterior().sample(y, params, draws=9, seed=3).double().numpy()
    summary = run.posterior().summary(y, params, draws=9, seed=3, levels=(0.25, 0.5))
    np.testing.assert_allclose(summary.mean, draws.mean(axis=0), atol=1e-4)
    assert summary.std is not None
    np.testing.assert_allclose(summary.std, draws.std(axis=0, ddof=1), atol=1e-4)
    np.testing.assert_allclose(
        summary.quantiles, np.quantile(draws, [0.25, 0.5], axis=0), atol=1e-4
    )
    assert run.posterior().summary(y, params, draws=1).std is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros((4, 1, 8, 9))}, r"`y` has shape \(4, 1, 8, 9\).*\(n, 1, 8, 8\)"),
        ({"y": np.zeros((1, 8, 8))}, r"give y\[None\]"),
        ({"y": np.zeros((0, 1, 8, 8))}, "holds no observations"),
        ({"y": np.zeros((4, 1, 8, 8), complex)}, "two bands, real and imaginary"),
        ({"y": torch.zeros(4, 1, 8, 8, dtype=torch.complex64)}, "two bands"),
        ({"y": [[1.0]]}, "is a list; give a tensor or an array"),
        ({"y": np.full((4, 1, 8, 8), np.nan)}, "NaN or infinity in 4 of 4 rows, first in row 0"),
        ({"params": None}, r"'mask' of the observations is missing, of shape \(n, 1, 8, 8\)"),
        ({"params": {"mask": np.ones((4, 1, 8, 8)), "shift": np.ones((4, 2))}}, "'shift'"),
        ({"params": {"mask": np.ones((3, 1, 8, 8))}}, "3 rows for 4 observations"),
        ({"params": {"mask": np.ones((4, 8, 8))}}, r"has shape \(n, 8, 8\).*reshape"),
        ({"draws": 0}, "draws is 0; give 1 or more"),
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"numbers": [1]}, "numbers has length 1 for 4"),
    ],
)
def test_what_does_not_fit_is_refused(
    run: Run,  # noqa: F811
    change: dict[str, Any],
    message: str,
) -> None:
    given: dict[str, Any] = {"y": np.ones((4, 1, 8, 8)), "params": {"mask": np.ones((4, 1, 8, 8))}}
    given |= change
    with pytest.raises(ValueError, match=message):
        run.posterior().sample(given.pop("y"), given.pop("params"), **given)


def test_iterations_devices_and_runs_that_are_not_there_are_refused(
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="has the complete iterations 0 to 1"):
        run.posterior(2)
    with pytest.raises(ValueError, match="holds no stopping decision"):
        run.posterior("best")
    with pytest.raises(ValueError, match="cuda:99"):
        open_run(run.url, device="cuda:99").posterior()
    with pytest.raises(ValueError, match="is not a run"):
        open_run(str(tmp_path))


def test_the_best_iteration_is_the_one_that_the_stopping_rule_named(
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    shutil.copytree(run.url, tmp_path / "copy")
    copy = open_run(str(tmp_path / "copy"))
    copy.store.write_stop(best=0, reason="nothing improved")
    assert copy.posterior("best").model_digest == run.posterior(0).model_digest
    assert copy.posterior("best").iteration == 0


def test_the_prior_draws_by_number(run: Run) -> None:  # noqa: F811
    prior = run.prior()
    samples = prior.sample(6, seed=4)
    assert samples.shape == (6, 1, 8, 8)
    torch.testing.assert_close(
        samples[2:5], prior.sample(3, seed=4, first=2, batch_size=2), atol=1e-3, rtol=0
    )
    assert (prior.sample(6, seed=5) - samples).abs().mean() > 0.1
    with pytest.raises(ValueError, match="n is 0"):
        prior.sample(0)


def test_the_prior_serves_another_channel_down_to_its_noise(run: Run) -> None:  # noqa: F811
    x = run.store.observations("holdout").truth(slice(0, 30))
    assert x is not None
    channel = super_resolution((1, 8, 8), factor=2, noise_std=0.4)
    generator = torch.Generator().manual_seed(0)
    params = channel.draw_params(30, generator=generator)
    y = channel.corrupt(torch.from_numpy(x), params, generator=generator)
    draws = run.posterior_under_prior(channel).sample(y, params, draws=2, steps=16)
    residual = torch.stack([channel.A(draw, params) - y for draw in draws])
    # Samples of the prior itself miss the blocks by several grey levels; posterior draws by the
    # noise (0.4), however little a network has learned in 12 steps.
    loose = channel.A(run.prior().sample(30), params) - y
    assert residual.square().mean().sqrt() < 2 * 0.4
    assert loose.square().mean().sqrt() > 5 * 0.4


def test_channels_that_the_prior_cannot_serve_are_refused(run: Run) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="linear channel with Gaussian noise"):
        run.posterior_under_prior(jpeg((1, 8, 8), quality=20, low=0, high=16))
    with pytest.raises(ValueError, match="some noise"):
        run.posterior_under_prior(RandomMask((1, 8, 8), keep=0.5, noise_std=0.0))
    with pytest.raises(ValueError, match=r"shape \(64,\) but the prior draws \(1, 8, 8\)"):
        run.posterior_under_prior(RandomMatrixChannel())


def test_an_observation_is_restored_in_a_fresh_process_within_seconds(used: Path) -> None:  # noqa: F811
    code = f"""
import time
from pipelines import open_run
import numpy as np
began = time.process_time()
run = open_run({str(used)!r})
y, mask = np.ones((1, 1, 8, 8), np.float32), np.ones((1, 1, 8, 8), np.float32)
draws = run.posterior().sample(y, {{"mask": mask}}, draws=4)
assert draws.shape == (4, 1, 1, 8, 8)
print(time.process_time() - began)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Seconds of processor time, which other processes on the machine do not stretch.
    assert float(done.stdout) < 5
