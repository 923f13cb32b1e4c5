"""Looks at held-out reconstructions: what they compute, what they leave alone, when they stop."""

import itertools

import pytest
import torch
from torch import Tensor

from diffem_core import (
    BetaTime,
    Channel,
    Denoiser,
    MStepResult,
    RandomMask,
    Scaling,
    TrainingState,
    UNet,
    Validation,
    VELogLinear,
    constant_rate,
    denoising_loss,
    derive_seed,
    m_step,
    seeded_initialization,
)
from diffem_core.validation import looks_without_gain

CHANNEL = RandomMask((1, 4, 4), keep=0.5, noise_std=0.5)
SCALING = Scaling.from_range(0, 16)


def images(n: int, seed: int = 0) -> Tensor:
    return 16 * torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


TRAIN, HELD_OUT = images(24), images(7, seed=1)


def denoiser(*, seed: int = 0, conditional: bool = True) -> Denoiser:
    with seeded_initialization(seed):
        return Denoiser(
            UNet(
                in_channels=1,
                condition_channels=CHANNEL.condition_channels if conditional else 0,
                out_channels=1,
                channels=(8,),
                blocks=(1,),
                embedding=8,
                dropout=0.2,
            )
        )


def train(model: Denoiser, channel: Channel | None = CHANNEL, **changes: object) -> MStepResult:
    settings: dict[str, object] = {
        "steps": 12,
        "batch_size": 10,
        "learning_rate": constant_rate(1e-2),
        "ema_decay": 0.8,
        "clip_norm": 1.0,
        "seed": 7,
        "validation": Validation(HELD_OUT, 5),
    }
    return m_step(
        model, TRAIN, channel, SCALING, VELogLinear(), BetaTime(), **(settings | changes)
    )  # type: ignore[arg-type]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_look_is_the_loss_of_the_averaged_weights() -> None:
    snapshots: dict[int, dict[str, Tensor]] = {}
    result = train(
        denoiser(), on_step=lambda state: snapshots.update({state.step: state.tensors()})
    )
    assert [step for step, _ in result.validation] == [5, 10, 12]
    assert not result.stopped_early
    assert result.steps == 12
    # By hand: all seven in one batch, from the weights' average after that step.
    generator = torch.Generator().manual_seed(derive_seed(7, "validation", 0))
    params = CHANNEL.draw_params(7, generator=generator)
    y = CHANNEL.corrupt(HELD_OUT, params, generator=generator)
    z = torch.empty_like(HELD_OUT).normal_(generator=generator)
    t = BetaTime().sample(
        7, schedule=VELogLinear(), generator=generator, device=torch.device("cpu")
    )
    model = denoiser(seed=99).eval()
    for step, loss in result.validation:
        average = {
            k.removeprefix("ema/"): v for k, v in snapshots[step].items() if k.startswith("ema/")
        }
        model.load_state_dict(average, strict=False)
        with torch.no_grad():
            expected = denoising_loss(
                model,
                SCALING.to_network(HELD_OUT),
                z,
                VELogLinear().sigma(t),
                CHANNEL.condition(y, params, SCALING),
            )
        assert loss == pytest.approx(float(expected), rel=1e-6)
    assert len({loss for _, loss in result.validation}) == 3


def test_a_loss_in_batches_counts_every_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # The loss of each held-out image alone is made its first pixel: the look is their mean, though
    # 7 images in batches of 3 leave one in the last.
    monkeypatch.setattr(
        "diffem_core.validation.denoising_loss", lambda f, x, z, s, c: x[:, 0, 0, 0].mean()
    )
    result = train(denoiser(), batch_size=3, steps=1)
    expected = float(SCALING.to_network(HELD_OUT)[:, 0, 0, 0].mean())
    assert result.validation == ((1, pytest.approx(expected, abs=1e-6)),)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recorruption": "fixed"},
        {"drop_condition": 0.3},
        {"channel": None},
        {"validation": Validation(HELD_OUT, 1, patience=12)},
    ],
    ids=["fresh", "fixed", "dropped", "unconditional", "every_step"],
)
def test_looking_leaves_training_as_it_is(changes: dict[str, object]) -> None:
    conditional = "channel" not in changes
    models = [denoiser(conditional=conditional) for _ in range(2)]
    looked = train(models[0], **changes)  # type: ignore[arg-type]
    blind = train(models[1], **(changes | {"validation": None}))  # type: ignore[arg-type]
    assert looked.validation
    assert blind.validation == ()
    assert equal(looked.weights, blind.weights)
    tensors = looked.state.tensors()
    del tensors["looks"]
    assert equal(tensors, blind.state.tensors())
    assert (looked.mean_loss, looked.last_loss) == (blind.mean_loss, blind.last_loss)


def test_held_out_samples_are_only_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient, no dropout, no dropped condition, and the same corruptions at each look."""
    calls: list[tuple[bool, bool, Tensor, Tensor, Tensor]] = []
    original = Denoiser.forward

    def spy(self: Denoiser, x_t: Tensor, sigma_t: Tensor, condition: Tensor) -> Tensor:
        modes = {module.training for module in self.modules()}
        assert len(modes) == 1
        calls.append((modes.pop(), torch.is_grad_enabled(), x_t, sigma_t, condition))
        return original(self, x_t, sigma_t, condition)

    monkeypatch.setattr(Denoiser, "forward", spy)
    train(denoiser(), drop_condition=0.9)
    training = [c for c in calls if c[0]]
    looks = [c for c in calls if not c[0]]
    assert len(training) == 12
    assert len(looks) == 3
    assert all(c[1] for c in training)
    assert not any(c[1] for c in looks)
    for one, other in itertools.pairwise(looks):
        for a, b in zip(one[2:], other[2:], strict=True):
            assert torch.equal(a, b)
    # Of seven masks of 16 pixels none is empty (a chance of 1e-4), so none was dropped.
    assert (looks[0][4][:, 1].flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("stop", [1, 5, 7, 10, 12])
def test_a_resumed_m_step_looks_as_before(stop: int) -> None:
    whole = train(denoiser())
    stored = interrupted(stop)
    torch.rand(17)
    resumed = train(denoiser(seed=99), state=TrainingState.from_tensors(stored))
    assert resumed.validation == whole.validation
    assert equal(whole.weights, resumed.weights)
    assert equal(whole.state.tensors(), resumed.state.tensors())


def interrupted(stop: int, **changes: object) -> dict[str, Tensor]:
    """Return what an M-step stored after a step, as a crash would leave it."""
    stored: dict[str, Tensor] = {}

    def crash(state: TrainingState) -> None:
        if state.step == stop:
            stored.update(state.tensors())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(denoiser(), on_step=crash, **changes)  # type: ignore[arg-type]
    return stored


RISING = {
    # Steps so long that the held-out loss soon rises.
    "steps": 40,
    "learning_rate": lambda step: 1e-2 if step < 6 else 1.0,
    "validation": Validation(HELD_OUT, 3, patience=2),
}


def test_it_stops_when_patience_is_out() -> None:
    result = train(denoiser(), **RISING)  # type: ignore[arg-type]
    losses = [loss for _, loss in result.validation]
    assert result.stopped_early
    assert result.steps == result.validation[-1][0] == result.state.step < 40
    assert losses.index(min(losses)) == len(losses) - 3
    assert len(losses) > 3, "the loss fell first"
    # It is what an M-step of so many steps does.
    short = train(denoiser(), **(RISING | {"steps": result.steps}))  # type: ignore[arg-type]
    assert equal(short.weights, result.weights)
    assert not short.stopped_early
    # Without patience the same losses do not stop it.
    patient = train(denoiser(), **(RISING | {"validation": Validation(HELD_OUT, 3)}))  # type: ignore[arg-type]
    assert patient.steps == 40
    assert patient.validation[: len(losses)] == result.validation


@pytest.mark.parametrize("before_the_end", [0, 1, 3, 5])
def test_a_resumed_m_step_stops_where_the_whole_one_does(before_the_end: int) -> None:
    whole = train(denoiser(), **RISING)  # type: ignore[arg-type]
    stored = interrupted(whole.steps - before_the_end, **RISING)
    state = TrainingState.from_tensors(stored)
    resumed = train(denoiser(seed=99), state=state, **RISING)  # type: ignore[arg-type]
    assert resumed.stopped_early
    assert resumed.validation == whole.validation
    assert equal(whole.weights, resumed.weights)
    assert equal(whole.state.tensors(), resumed.state.tensors())


def test_a_state_without_looks_goes_on_with_them() -> None:
    whole = train(denoiser())
    for stop, looks in ((4, whole.validation), (10, whole.validation[1:])):
        stored = interrupted(stop, validation=None)
        assert "looks" not in stored
        resumed = train(denoiser(seed=99), state=TrainingState.from_tensors(stored))
        assert resumed.validation == looks
        assert equal(whole.weights, resumed.weights)


def test_looks_without_gain() -> None:
    cases = {(): 0, (2.0,): 0, (2.0, 2.0): 1, (2.0, 1.0): 0, (2.0, 1.0, 3.0, 1.0): 2}
    for losses, expected in cases.items():
        assert looks_without_gain(list(enumerate(losses))) == expected, losses


def test_a_diverged_look_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "diffem_core.validation.denoising_loss", lambda *_: torch.tensor(float("nan"))
    )
    with pytest.raises(FloatingPointError, match="held-out loss is nan; lower the learning rate"):
        train(denoiser())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no reconstructions; give at least one"):
        Validation(HELD_OUT[:0], 1)
    with pytest.raises(ValueError, match="every 0 and patience None; give at least 1"):
        Validation(HELD_OUT, 0)
    with pytest.raises(ValueError, match="every 1 and patience 0"):
        Validation(HELD_OUT, 1, patience=0)
    with pytest.raises(ValueError, match=r"held-out reconstructions of shape \(7, 1, 2, 8\)"):
        train(denoiser(), validation=Validation(HELD_OUT.reshape(7, 1, 2, 8), 1))
