"""What the evaluation's numbers mean, on posteriors that are known in closed form."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from diffem_core.channel import RandomMask
from diffem_core.noise import SampleNoise
from diffem_core.scaling import Scaling
from pipelines.evaluation import Evaluation, Observed, Truth, evaluate, work_of
from storage_schemas.config import EvaluationConfig, SinkhornDistance

SHAPE = (1, 8, 8)
STD = 2.0
SCALING = Scaling.from_range(-4.0, 4.0)


class WhitePosterior:
    """The posterior of x ~ N(0, STD^2 I) under a noiseless mask: what is hidden is drawn anew."""

    def __init__(self, spread: float = STD) -> None:
        self.spread = spread

    def sample(
        self,
        y: Tensor,
        params: Mapping[str, Tensor],
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> Tensor:
        z = SampleNoise(seeds).normal(SHAPE) * self.spread * temperature
        return torch.where(params["mask"] > 0.5, y, z)


def observe(n: int, seed: int) -> tuple[Tensor, Observed]:
    generator = torch.Generator().manual_seed(seed)
    channel = RandomMask(SHAPE, keep=0.5, noise_std=0.0)
    x = torch.randn(n, *SHAPE, generator=generator) * STD
    params = channel.draw_params(n, generator=generator)
    y = channel.corrupt(x, params, generator=generator)
    return x, Observed(sample_ids=range(n), y=y, params=params)


def judge(
    posterior: WhitePosterior, config: EvaluationConfig, *, with_truth: bool = True
) -> Evaluation:
    x_holdout, holdout = observe(120, 0)
    x_training, others = observe(400, 1)
    truth = Truth(holdout=x_holdout, holdout_labels=None, training=x_training, classifier=None)
    return evaluate(
        posterior,
        channel=RandomMask(SHAPE, keep=0.5, noise_std=0.0),
        scaling=SCALING,
        config=config,
        holdout=holdout,
        others=others,
        truth=truth if with_truth else None,
        floors=None,
        seed=3,
        batch_size=64,
    )


CONFIG = EvaluationConfig(draws=4, reconstructions=100, preview=0)


def test_the_errors_are_those_of_the_closed_form() -> None:
    values = judge(WhitePosterior(), CONFIG).metrics.numbers()
    # Hidden entries: a draw and the truth are independent, so that the mean square of their
    # difference is 2 STD^2, and STD^2 (1 + 1/4) for the mean of four draws. About 3,840 hidden
    # entries: relative standard errors of the roots of 1/sqrt(2 x 3840) = 0.011 or less.
    scale = SCALING.scale * STD
    assert values["hidden_rmse_sample"] == pytest.approx(scale * math.sqrt(2), rel=5 * 0.011)
    assert values["hidden_rmse_mean"] == pytest.approx(scale * math.sqrt(1.25), rel=5 * 0.011)
    assert values["rmse_mean"] == pytest.approx(
        scale * math.sqrt(1.25 / 2),
        rel=5 * 0.011 + 0.02,  # half of the pixels, +- 0.006
    )
    assert values["spread_ratio"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("spread", "low", "high"), [(0.5 * STD, 0.3, 0.8), (2 * STD, 1.2, 2.2)])
def test_the_spread_ratio_tells_too_sure_from_too_spread(
    spread: float, low: float, high: float
) -> None:
    ratio = judge(WhitePosterior(spread), CONFIG).metrics.numbers()["spread_ratio"]
    assert ratio is not None
    assert low < ratio < high


def test_the_divergence_is_at_its_floor_for_the_true_posterior_and_above_it_for_another() -> None:
    true = judge(WhitePosterior(), CONFIG).metrics.values
    wrong = judge(WhitePosterior(0.3 * STD), CONFIG).metrics.values
    value, floor, error = (
        true["divergence"].value,
        true["divergence_floor"].value,
        true["divergence"].standard_error,
    )
    assert value is not None
    assert floor is not None
    assert error is not None
    assert abs(value - floor) < 5 * error
    assert wrong["divergence"].value is not None
    assert wrong["divergence"].value - floor > 10 * error


def test_without_truth_nothing_of_it_is_measured() -> None:
    with_truth = judge(WhitePosterior(), CONFIG)
    without = judge(WhitePosterior(), CONFIG, with_truth=False)
    assert set(without.metrics.values) == {
        "divergence",
        "divergence_floor",
        "sliced_wasserstein",
        "sliced_wasserstein_floor",
    }
    assert torch.equal(with_truth.draws, without.draws)
    for name, metric in without.metrics.values.items():
        assert metric == with_truth.metrics.values[name]


def test_floors_are_taken_over() -> None:
    first = judge(WhitePosterior(), CONFIG).metrics.values
    _, holdout = observe(120, 0)
    _, others = observe(400, 1)
    again = evaluate(
        WhitePosterior(0.5 * STD),
        channel=RandomMask(SHAPE, keep=0.5, noise_std=0.0),
        scaling=SCALING,
        config=CONFIG,
        holdout=holdout,
        others=others,
        truth=None,
        floors=first,
        seed=3,
        batch_size=64,
    ).metrics.values
    assert again["divergence_floor"] == first["divergence_floor"]
    assert again["divergence"] != first["divergence"]


def test_the_work_that_is_announced_is_the_work_that_is_done() -> None:
    done = []
    _, holdout = observe(120, 0)
    _, others = observe(400, 1)
    evaluate(
        WhitePosterior(),
        channel=RandomMask(SHAPE, keep=0.5, noise_std=0.0),
        scaling=SCALING,
        config=CONFIG,
        holdout=holdout,
        others=others,
        truth=None,
        floors=None,
        seed=3,
        batch_size=50,
        on_progress=done.append,
    )
    assert sum(done) == work_of(CONFIG, holdout=120, others=400) == 4 * 120 + 100


def test_a_distance_whose_clean_samples_are_all_taken_says_so() -> None:
    config = sinkhorn_config(reconstructions=400)
    metric = judge(WhitePosterior(), config).metrics.values["distance"]
    assert metric.value is None
    assert "lower reconstructions" in metric.long_name


def sinkhorn_config(*, reconstructions: int) -> EvaluationConfig:
    return EvaluationConfig(
        draws=2,
        reconstructions=reconstructions,
        preview=0,
        distance=SinkhornDistance(samples=64),
    )
