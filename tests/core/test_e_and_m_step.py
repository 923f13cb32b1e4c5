"""The E-step, the M-step and what both promise."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from diffem_core import (
    MLP,
    Augmentation,
    BetaTime,
    Denoiser,
    DiffusionPosterior,
    DiffusionPrior,
    GaussianPosterior,
    GaussianPrior,
    MStepResult,
    RandomMask,
    RandomMatrix,
    Scaling,
    TrainingState,
    UNet,
    UniformTime,
    VELogLinear,
    constant_rate,
    ddpm,
    denoising_loss,
    derive_seed,
    dpm_solver,
    e_step,
    linear_rate,
    log_linear_grid,
    m_step,
    refreshed,
    seeded_initialization,
)
from diffem_core.examples import Batches
from diffem_core.training import FlatAdam

CHANNEL = RandomMask((1, 8, 8), keep=0.5, noise_std=0.5)
SCALING = Scaling.from_range(0, 16)


def images(n: int = 24, seed: int = 0) -> Tensor:
    return 16 * torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def denoiser(*, dropout: float = 0.2, seed: int = 0) -> Denoiser:
    with seeded_initialization(seed):
        return Denoiser(
            UNet(
                in_channels=1,
                condition_channels=CHANNEL.condition_channels,
                out_channels=1,
                channels=(8, 8),
                blocks=(1, 1),
                attention={1: 2},
                embedding=8,
                dropout=dropout,
            )
        )


def train(model: Denoiser, x_hat: Tensor, **changes: object) -> MStepResult:
    settings: dict[str, object] = {
        "steps": 12,
        "batch_size": 10,
        "learning_rate": linear_rate(1e-2, floor=0.1, steps=12),
        "ema_decay": 0.8,
        "clip_norm": 1.0,
        "seed": 7,
    }
    return m_step(
        model, x_hat, CHANNEL, SCALING, VELogLinear(), BetaTime(), **(settings | changes)
    )  # type: ignore[arg-type]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("recorruption", ["fresh", "fixed"])
@pytest.mark.parametrize("stop", [1, 5, 12])
def test_a_resumed_m_step_ends_with_the_same_bits(stop: int, recorruption: str) -> None:
    x_hat = images()
    whole = train(denoiser(), x_hat, recorruption=recorruption)
    stored: dict[str, Tensor] = {}

    def keep(state: TrainingState) -> None:
        if state.step == stop:
            stored.update(state.tensors())

    train(denoiser(), x_hat, recorruption=recorruption, on_step=keep)
    # A fresh process: other initial weights, the global generator elsewhere, all from the stored
    # tensors.
    torch.rand(17)
    state = TrainingState.from_tensors(stored)
    model = denoiser(seed=99)
    resumed = train(model, x_hat, recorruption=recorruption, state=state)
    assert equal(whole.weights, resumed.weights)
    assert equal(whole.state.tensors(), resumed.state.tensors())
    assert (whole.mean_loss, whole.last_loss) == (resumed.mean_loss, resumed.last_loss)
    assert equal(model.state_dict(), whole.weights)


def test_a_snapshot_is_a_copy() -> None:
    snapshots: list[dict[str, Tensor]] = []
    train(denoiser(), images(), on_step=lambda state: snapshots.append(state.tensors()))
    assert [int(s["step"]) for s in snapshots] == list(range(1, 13))
    weights = [s["weights/network.leave.weight"] for s in snapshots]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(weights))


def test_a_state_of_another_network_is_refused() -> None:
    state = train(denoiser(), images()).state
    with seeded_initialization(0):
        other = Denoiser(
            UNet(in_channels=1, condition_channels=2, out_channels=1, channels=(8,), blocks=(1,))
        )
    with pytest.raises(ValueError, match="resume with the network that wrote the state"):
        train(other, images(), state=state)
    with pytest.raises(ValueError, match=r"lacks \['losses', 'step'\]"):
        TrainingState.from_tensors({"weights/a": torch.zeros(1)})
    with pytest.raises(ValueError, match="done 12 steps but this M-step has 6"):
        train(denoiser(), images(), state=state, steps=6)


def test_each_seed_is_another_m_step() -> None:
    first, second = (train(denoiser(), images(), seed=s).weights for s in (1, 2))
    assert not equal(first, second)


# ------------------------------------------------------------------------------------- arithmetic


def test_the_update_is_clipped_adam_with_a_moving_average() -> None:
    # Against torch.optim.Adam and clip_grad_norm_, in float64.
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(2, 3, 3), nn.SiLU(), nn.Conv2d(3, 1, 3)).double()
    ours = ours.to(memory_format=torch.channels_last)
    theirs = nn.Sequential(nn.Conv2d(2, 3, 3), nn.SiLU(), nn.Conv2d(3, 1, 3)).double()
    theirs.load_state_dict(ours.state_dict())
    average = {n: p.detach().clone() for n, p in theirs.named_parameters()}
    flat = FlatAdam(ours, clip_norm=0.5, ema_decay=0.7)
    adam = torch.optim.Adam(theirs.parameters(), lr=1.0)
    clipped = 0
    for step in range(1, 21):
        x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
        rate = 1e-2 / step
        for module in (ours, theirs):
            (module(x).square().mean() * (3 if step % 2 else 0.1)).backward()
        norm = flat.update(step, rate)
        # (torch divides by the norm + 1e-6.)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        torch.testing.assert_close(norm, expected)
        clipped += float(norm) > 0.5
        adam.param_groups[0]["lr"] = rate
        adam.step()
        adam.zero_grad()
        for name, parameter in theirs.named_parameters():
            average[name].lerp_(parameter.detach(), 0.3)
    assert 0 < clipped < 20
    groups = flat.groups()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            groups["weights"][name], parameter.detach(), rtol=1e-5, atol=1e-7
        )
        torch.testing.assert_close(groups["ema"][name], average[name], rtol=1e-5, atol=1e-7)
    flat.release()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, groups["ema"][name])
        assert parameter.grad is None
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 8, "memory of its own"


def test_the_model_of_an_iteration_is_the_average() -> None:
    model = denoiser()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    seen: list[dict[str, Tensor]] = []
    result = train(model, images(), on_step=lambda state: seen.append(state.tensors()))
    average = before
    for tensors in seen:
        average = {n: torch.lerp(a, tensors[f"weights/{n}"], 1 - 0.8) for n, a in average.items()}
    for name, tensor in result.weights.items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-7)
    assert equal(model.state_dict(), result.weights)
    assert not model.training
    assert result.steps == 12


def test_losses_are_those_of_the_steps() -> None:
    losses: list[float] = []
    result = train(denoiser(), images(), on_step=lambda state: losses.append(state.last_loss))
    assert result.mean_loss == pytest.approx(sum(losses) / 12)
    assert result.last_loss == losses[-1]
    assert len(set(losses)) == 12


def test_a_batch_copies_its_own_rows_alone() -> None:
    batches = Batches(100_000, 64, seed=3)
    # The second step, and one that ends a pass and begins the next.
    for step in (1, 100_000 // 64):
        assert batches.rows(step).untyped_storage().nbytes() == 64 * 8


def test_batches_go_through_all_samples_at_each_pass() -> None:
    batches = Batches(10, 4, seed=3)
    rows = [batches.rows(k) for k in range(15)]
    assert all(len(r) == 4 for r in rows)
    passes = torch.cat(rows).reshape(6, 10)
    assert all(sorted(p.tolist()) == list(range(10)) for p in passes)
    assert len({tuple(p.tolist()) for p in passes}) == 6
    # A step's rows do not depend on the steps before it, and a batch may be larger than the data.
    assert torch.equal(Batches(10, 4, seed=3).rows(7), rows[7])
    assert sorted(Batches(3, 7, seed=3).rows(0).tolist())[::2] != []
    assert torch.bincount(Batches(3, 7, seed=3).rows(0)).tolist() in (
        [3, 2, 2],
        [2, 3, 2],
        [2, 2, 3],
    )


@pytest.mark.parametrize("recorruption", ["fresh", "fixed"])
def test_recorruption(recorruption: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Observe what the network is shown of the same two samples over several passes.
    conditions: list[Tensor] = []
    original = RandomMask.condition

    def spy(self: RandomMask, y: Tensor, params: dict[str, Tensor], scaling: Scaling) -> Tensor:
        conditions.append(original(self, y, params, scaling))
        return conditions[-1]

    monkeypatch.setattr(RandomMask, "condition", spy)
    x_hat = images(2)
    train(denoiser(), x_hat, recorruption=recorruption, batch_size=2, steps=4)
    masks = {tuple(c.flatten().tolist()) for step in conditions for c in step[:, 1]}
    assert len(masks) == (8 if recorruption == "fresh" else 2)


def test_the_m_step_calls_the_channel_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = RandomMask.corrupt
    monkeypatch.setattr(
        RandomMask, "corrupt", lambda self, *a, **k: calls.append(self) or original(self, *a, **k)
    )
    train(denoiser(), images(), steps=3)
    assert calls == [CHANNEL] * 3


def test_an_unconditional_m_step_never_corrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the prior is learned from reconstructions alone")

    for method in ("corrupt", "draw_params", "condition"):
        monkeypatch.setattr(RandomMask, method, refuse)
    with seeded_initialization(0):
        network = UNet(
            in_channels=1, condition_channels=0, out_channels=1, channels=(8,), blocks=(1,)
        )
    settings = {
        "steps": 3,
        "batch_size": 8,
        "learning_rate": constant_rate(1e-3),
        "ema_decay": 0.5,
        "clip_norm": 1.0,
        "seed": 0,
    }
    model = Denoiser(network)
    result = m_step(model, images(), None, SCALING, VELogLinear(), BetaTime(), **settings)
    assert math.isfinite(result.mean_loss)
    grid = log_linear_grid(1e2, 1e-2, 4)
    prior = DiffusionPrior(model, SCALING, functools.partial(ddpm, sigmas=grid), x_shape=(1, 8, 8))
    x = prior.sample(seeds=[5, 6, 7])
    assert x.shape == (3, 1, 8, 8)
    torch.testing.assert_close(prior.sample(seeds=[6]), x[1:2], rtol=1e-4, atol=1e-4)


def test_conditions_are_dropped_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Tensor] = []
    model = denoiser()
    model.network.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[2]))
    train(model, images(100), steps=20, batch_size=100, drop_condition=0.3)
    dropped = torch.cat([(c == 0).flatten(1).all(1) for c in shown]).double()
    assert len(dropped) == 2000
    assert abs(float(dropped.mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 2000)
    with pytest.raises(ValueError, match=r"drop_condition 1.0; give a number in \[0, 1\)"):
        train(model, images(), drop_condition=1.0)
    # Sampling with no condition gives the prior's samples; the zeros are those of a dropped one.
    prior = DiffusionPrior(
        model,
        SCALING,
        functools.partial(ddpm, sigmas=log_linear_grid(1e2, 1e-2, 2)),
        x_shape=(1, 8, 8),
        condition_channels=CHANNEL.condition_channels,
    )
    shown.clear()
    prior.sample(seeds=[1, 2])
    assert all((c == 0).all() and c.shape == (2, 2, 8, 8) for c in shown)


def test_augmentation_comes_before_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    # The channel sees the augmented image, and so does the loss: they agree wherever a pixel is
    # seen without noise.
    clean = RandomMask((1, 8, 8), keep=0.5, noise_std=0.0)
    pairs: list[tuple[Tensor, Tensor]] = []
    original = Denoiser.forward

    def spy(self: Denoiser, x_t: Tensor, sigma_t: Tensor, condition: Tensor) -> Tensor:
        pairs.append((x_t, condition))
        return original(self, x_t, sigma_t, condition)

    monkeypatch.setattr(Denoiser, "forward", spy)
    x_hat = images(2)
    m_step(
        denoiser(),
        x_hat,
        clean,
        SCALING,
        VELogLinear(sigma_min=1e-6, sigma_max=1e-5),
        UniformTime(),
        steps=12,
        batch_size=2,
        learning_rate=constant_rate(1e-12),
        ema_decay=0.5,
        clip_norm=1.0,
        augmentation=Augmentation(flip=True),
        seed=0,
    )
    flipped = 0
    for x_t, condition in pairs:
        torch.testing.assert_close(x_t * condition[:, 1:], condition[:, :1], rtol=0, atol=1e-3)
        for one in x_t:
            plain = [(one - SCALING.to_network(x)).abs().max() < 1e-3 for x in x_hat]
            mirrored = [(one - SCALING.to_network(x.flip(-1))).abs().max() < 1e-3 for x in x_hat]
            assert any(plain) != any(mirrored)
            flipped += any(mirrored)
    assert 3 < flipped < 21  # Of 24, each with probability 1/2.
    with pytest.raises(ValueError, match="would no longer belong to the images"):
        train(denoiser(), images(), augmentation=Augmentation(), recorruption="fixed")


def test_a_diverged_m_step_stops_and_says_where() -> None:
    model = denoiser()
    x_hat = images()
    x_hat[:] = math.inf
    message = "diverged at step 0: loss .*noise levels from .*; lower the learning rate"
    with pytest.raises(FloatingPointError, match=message):
        train(model, x_hat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "0 steps of 10 samples"),
        ({"batch_size": 0}, "12 steps of 0 samples"),
        ({"recorruption": "never"}, "'never'; known are 'fresh', 'fixed'"),
    ],
)
def test_bad_m_steps(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(denoiser(), images(), **changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 1, 8, 9), r"shape \(4, 1, 8, 9\) but the channel's samples have shape \(1, 8, 8\)"),
        ((0, 1, 8, 8), "no reconstructions; give at least one"),
    ],
)
def test_reconstructions_must_fit_the_channel(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(denoiser(), torch.zeros(shape))


# ----------------------------------------------------------------------------------------- E-step


def posterior(model: Denoiser, steps: int = 6) -> DiffusionPosterior:
    sampler = functools.partial(dpm_solver, sigmas=log_linear_grid(1e2, 1e-2, steps))
    return DiffusionPosterior(model, CHANNEL, SCALING, sampler)


def observed(n: int) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    generator = torch.Generator().manual_seed(5)
    params = CHANNEL.draw_params(n, generator=generator)
    y = CHANNEL.corrupt(images(n), params, generator=generator)
    return y, params, [derive_seed("e", i) for i in range(n)]


def test_reconstructions_do_not_depend_on_the_batch_size() -> None:
    model = denoiser()
    train(model, images())
    y, params, seeds = observed(11)
    progress: list[int] = []
    one = e_step(posterior(model), y, params, seeds=seeds, batch_size=11)
    parts = e_step(
        posterior(model), y, params, seeds=seeds, batch_size=4, on_progress=progress.append
    )
    assert one.shape == (11, 1, 8, 8)
    assert progress == [4, 4, 3]
    # The same draws exactly; float32 sums in other orders differ in the last bits.
    torch.testing.assert_close(one, parts, rtol=1e-4, atol=1e-4)
    again = e_step(posterior(model), y, params, seeds=seeds, batch_size=11)
    assert torch.equal(one, again)
    other = e_step(posterior(model), y, params, seeds=[s + 1 for s in seeds], batch_size=11)
    assert (one - other).abs().mean() > 1e-2


def test_evaluation_leaves_the_weights_untouched() -> None:
    model = denoiser()
    train(model, images())
    model.train()  # Whoever left it in training mode: sampling switches dropout off.
    before = {n: t.clone() for n, t in model.state_dict().items()}
    y, params, seeds = observed(4)
    x = e_step(posterior(model), y, params, seeds=seeds, batch_size=4)
    assert equal(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad
    model.eval()
    assert torch.equal(x, e_step(posterior(model), y, params, seeds=seeds, batch_size=4))


@pytest.mark.parametrize("steps", [1, 5])
def test_a_posterior_calls_the_network_once_a_step(steps: int) -> None:
    model = denoiser()
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    y, params, seeds = observed(3)
    posterior(model, steps).sample(y, params, seeds=seeds)
    assert len(calls) == steps


def test_non_finite_reconstructions_are_refused() -> None:
    class Broken:
        def sample(
            self,
            y: Tensor,
            params: dict[str, Tensor],
            *,
            seeds: list[int],
            temperature: float = 1.0,
        ) -> Tensor:
            x = torch.zeros(len(y), 1, 8, 8)
            x[1, 0, 3, 3] = math.nan if seeds[0] == 3 else 0.0
            return x

    y, params, _ = observed(6)
    with pytest.raises(FloatingPointError, match=r"1 of the samples .* \(numbers \[4\] of"):
        e_step(Broken(), y, params, seeds=range(6), batch_size=3)


def test_bad_e_steps() -> None:
    y, params, seeds = observed(3)
    model = posterior(denoiser())
    with pytest.raises(ValueError, match="no observations"):
        e_step(model, y[:0], {"mask": params["mask"][:0]}, seeds=[], batch_size=4)
    with pytest.raises(ValueError, match="batch_size 0"):
        e_step(model, y, params, seeds=seeds, batch_size=0)
    with pytest.raises(ValueError, match="3 observations but seeds of length 2"):
        e_step(model, y, params, seeds=seeds[:2], batch_size=4)
    with pytest.raises(ValueError, match=r"params\['mask'\] of length 2"):
        e_step(model, y, {"mask": params["mask"][:2]}, seeds=seeds, batch_size=4)
    with pytest.raises(ValueError, match="2 seeds for 3 observations"):
        model.sample(y, params, seeds=seeds[:2])


# ------------------------------------------------------------------------------------ both at work


def test_a_learned_posterior_finds_the_exact_one() -> None:
    """Train on samples of a Gaussian, seen through random rows: samples approach the exact
    posterior's."""
    torch.manual_seed(0)
    channel = RandomMatrix(2, rows=1, noise_std=0.3)
    factor = torch.tensor([[1.0, 0.0], [0.9, 0.3]], dtype=torch.float64)
    prior = GaussianPrior(
        mean=torch.tensor([0.5, -0.5], dtype=torch.float64),
        factor=factor,
        diag=torch.zeros(2, dtype=torch.float64),
    )
    n = 2000
    generator = torch.Generator().manual_seed(1)
    x = (prior.mean + torch.randn(n, 2, generator=generator).double() @ factor.mT).float()
    params = channel.draw_params(n, generator=generator)
    y = channel.corrupt(x, params, generator=generator)
    schedule = VELogLinear(sigma_min=1e-2, sigma_max=2e1)
    with seeded_initialization(0):
        model = Denoiser(
            MLP(features=2, condition_features=channel.condition_channels, hidden=(64, 64))
        )
    scaling = Scaling.identity()
    m_step(
        model,
        x,
        channel,
        scaling,
        schedule,
        UniformTime(),
        steps=700,
        batch_size=256,
        learning_rate=linear_rate(5e-3, floor=0.02, steps=700),
        ema_decay=0.98,
        clip_norm=1.0,
        seed=0,
    )
    sampler = functools.partial(ddpm, sigmas=log_linear_grid(2e1, 1e-2, 48))
    learned = DiffusionPosterior(model, channel, scaling, sampler)
    exact = GaussianPosterior(prior, channel)
    seeds = range(n)
    ours = e_step(learned, y, params, seeds=seeds, batch_size=n).double()
    theirs = e_step(exact, y, params, seeds=seeds, batch_size=n).double()
    # Averaged over observations, both are samples of the prior: compare second moments, and the
    # gap to the exact mean.
    S = prior.covariance()
    assert (torch.cov(ours.mT) - S).abs().max() < 0.12
    mean = exact.mean(y, params).double()
    spread, exact_spread = ((a - mean).square().sum(1).mean() for a in (ours, theirs))
    assert 0.8 < float(spread / exact_spread) < 1.25
    # Without the observation, spread around the mean would be that of the prior, several times as
    # large.
    prior_spread = float((x.double() - mean.roll(1, 0)).square().sum(1).mean())
    assert prior_spread > 4 * float(spread)


def test_training_lowers_the_loss_on_held_out_samples() -> None:
    x = torch.cat([images(40, seed=3).sort(dim=-1).values, images(40, seed=4).sort(-1).values])
    model = denoiser(dropout=0.0)

    def held_out() -> float:
        generator = torch.Generator().manual_seed(0)
        params = CHANNEL.draw_params(40, generator=generator)
        condition = CHANNEL.condition(
            CHANNEL.corrupt(x[40:], params, generator=generator), params, SCALING
        )
        z = torch.randn(40, 1, 8, 8, generator=generator)
        sigma = torch.logspace(-1, 1, 40)
        with torch.no_grad():
            return float(denoising_loss(model, SCALING.to_network(x[40:]), z, sigma, condition))

    before = held_out()
    train(
        model, x[:40], steps=150, learning_rate=constant_rate(3e-3), batch_size=40, ema_decay=0.95
    )
    assert held_out() < 0.7 * before


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.3, 0.5, 1.0])
def test_a_lazy_e_step_gives_every_observation_its_turn_at_even_intervals(
    fraction: float,
) -> None:
    ids = list(range(4000))
    turns = torch.stack(
        [refreshed(ids, iteration=k, fraction=fraction, seed=7) for k in range(20)]
    )
    # 20 iterations hold 20 f turns of each observation (an integer for these fractions).
    assert (turns.sum(0) == round(20 * fraction)).all()
    share = turns.double().mean(1)
    assert (share - fraction).abs().max() < 5 * math.sqrt(fraction * (1 - fraction) / 4000) + 1e-9
    for observation in turns.T[:50]:
        gaps = observation.nonzero().flatten().diff()
        assert ((gaps - 1 / fraction).abs() < 1).all()
    again = refreshed(ids[::-1], iteration=3, fraction=fraction, seed=7)
    assert torch.equal(again.flip(0), turns[3]), "the id decides, not the place"


def test_a_lazy_e_step_refuses_other_fractions() -> None:
    with pytest.raises(ValueError, match=r"fraction 0; give a number in \(0, 1\]"):
        refreshed([1], iteration=0, fraction=0, seed=0)
