"""An M-step of two processes is the M-step of one; batches that do not fit are done in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffem_core import (
    BetaTime,
    Denoiser,
    MStepResult,
    RandomMask,
    Scaling,
    TrainingState,
    UNet,
    VELogLinear,
    constant_rate,
    m_step,
    seeded_initialization,
)
from diffem_core.data_parallel import DataParallel, parts_of
from diffem_core.networks.dropout import Dropout
from diffem_core.validation import Validation

Results = dict[str, Any]
CHANNEL = RandomMask((1, 8, 8), keep=0.5, noise_std=0.5)
STEPS = 6


class DoubleSchedule(VELogLinear):
    """The schedule in float64, so that a whole M-step is."""

    def sigma(self, t: Tensor) -> Tensor:
        return super().sigma(t.double())


def images(n: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 16 * torch.rand(n, 1, 8, 8, generator=generator, dtype=dtype)


def denoiser(dtype: torch.dtype, *, seed: int = 0) -> Denoiser:
    with seeded_initialization(seed):
        network = UNet(
            in_channels=1,
            condition_channels=CHANNEL.condition_channels,
            out_channels=1,
            channels=(8, 8),
            blocks=(1, 1),
            attention={1: 2},
            embedding=8,
            dropout=0.2,
        )
    return Denoiser(network).to(dtype)


def train(model: Denoiser, dtype: torch.dtype, **changes: Any) -> MStepResult:
    """An M-step with all that draws: dropout, dropped conditions, a held-out loss."""
    settings: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 7,  # Neither by two processes nor by two pieces.
        "learning_rate": constant_rate(1e-2),
        "ema_decay": 0.8,
        "clip_norm": 1.0,
        "drop_condition": 0.3,
        "validation": Validation(images(9, 1, dtype), every=2),
        "seed": 7,
    }
    schedule = DoubleSchedule() if dtype == torch.float64 else VELogLinear()
    return m_step(
        model,
        images(20, 0, dtype),
        CHANNEL,
        Scaling.from_range(0, 16),
        schedule,
        BetaTime(),
        **(settings | changes),
    )


# ------------------------------------------------------------------------------- two processes


class Hungry(nn.Module):
    """A network that runs out of memory in the backward pass of more than `limit` samples."""

    def __init__(self, network: nn.Module, limit: int) -> None:
        super().__init__()
        self.network = network
        self.limit = limit

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None) -> Tensor:
        # x itself needs no gradient, and would get no backward pass.
        fail = self.training and len(x) > self.limit
        output: Tensor = self.network(_Fail.apply(x.requires_grad_(), fail), c_noise, condition)
        return output


class _Fail(torch.autograd.Function):
    """Fails in its backward pass: those of all layers that come later have been done by then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fail: bool) -> Tensor:
        ctx.fail = fail
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if ctx.fail:
            raise torch.OutOfMemoryError("CUDA out of memory, says the test")
        return gradients[0], None


def hungry(dtype: torch.dtype, limit: int) -> Denoiser:
    model = denoiser(dtype)
    model.network = Hungry(model.network, limit)
    return model


def unwrapped(result: MStepResult) -> MStepResult:
    weights = {n.replace("network.network.", "network."): w for n, w in result.weights.items()}
    return MStepResult(**(vars(result) | {"weights": weights}))


def cases(group: DataParallel | None) -> dict[str, Any]:
    """Do M-steps, in one of two processes or alone; what is returned has been stored before."""
    rank = 0 if group is None else group.rank
    double, single = torch.float64, torch.float32
    done: dict[str, Any] = {}
    # Weights and state of process 0 count: the other one begins with others, and without a state.
    done["double"] = train(denoiser(double, seed=rank), double, group=group)
    done["single"] = train(denoiser(single, seed=rank), single, group=group)
    done["fixed"] = train(
        denoiser(double), double, group=group, recorruption="fixed", steps=2, validation=None
    )
    done["tiny batch"] = train(denoiser(double), double, group=group, batch_size=1, steps=2)
    kept: dict[int, dict[str, Tensor]] = {}
    train(
        denoiser(double),
        double,
        group=group,
        steps=STEPS,
        on_step=lambda live: kept.update({live.step: live.tensors()}),
    )
    state = TrainingState.from_tensors(kept[3]) if rank == 0 else None
    done["resumed"] = train(denoiser(double, seed=5), double, group=group, state=state)
    done["patience"] = train(
        denoiser(double),
        double,
        group=group,
        learning_rate=constant_rate(1.0),
        validation=Validation(images(9, 1, double), every=1, patience=1),
    )
    # Only the last process asks for an end, at its third step.
    calls = itertools.count(1)
    last = group is None or group.rank == group.size - 1
    done["stopped"] = train(
        denoiser(double), double, group=group, stop=lambda: next(calls) >= 3 and last
    )
    # Process 0 has room for two samples at once, process 1 for all.
    splits: list[int] = []
    limit = 2 if rank == 0 else 100
    result = train(hungry(double, limit), double, group=group, on_split=splits.append)
    done["pieces"], done["splits"] = unwrapped(result), splits
    return done


def stored(done: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        if isinstance(value, list)
        else {
            "weights": dict(value.weights),
            "state": value.state.tensors(),
            "mean_loss": value.mean_loss,
            "steps": value.steps,
            "looks": value.validation,
            "early": value.stopped_early,
            "interrupted": value.interrupted,
        }
        for name, value in done.items()
    }


def rank_main(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
    )
    try:
        torch.save(stored(cases(DataParallel())), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> Results:
    return stored(cases(None))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What two processes end with."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def distance(a: Results, b: Results, dtype: torch.dtype) -> float:
    """Distance of the weights of two M-steps, relative to how far they moved."""
    start = denoiser(dtype).state_dict()
    ours, theirs = (
        torch.cat([(w - start[n]).flatten() for n, w in r["weights"].items()]) for r in (a, b)
    )
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


CASES = ["double", "single", "fixed", "tiny batch", "resumed", "patience", "stopped", "pieces"]


@pytest.mark.parametrize("name", CASES)
def test_both_processes_hold_the_same_bits(together: list[Results], name: str) -> None:
    first, second = (results[name] for results in together)
    for key in ("weights", "state"):
        assert first[key].keys() == second[key].keys()
        assert all(torch.equal(first[key][n], second[key][n]) for n in first[key])
    assert first["looks"] == second["looks"]


@pytest.mark.parametrize("name", [name for name in CASES if name != "single"])
def test_two_processes_end_where_one_ends(
    together: list[Results], alone: Results, name: str
) -> None:
    # Float64: a sum in another order is another by some 1e-15 of itself; Adam divides by the root
    # of the second moment, which carries that on and does not grow in so few steps.
    for ours in together:
        theirs = alone[name]
        assert distance(ours[name], theirs, torch.float64) < 1e-10
        assert ours[name]["steps"] == theirs["steps"]
        assert ours[name]["mean_loss"] == pytest.approx(theirs["mean_loss"], rel=1e-10)
        assert [step for step, _ in ours[name]["looks"]] == [s for s, _ in theirs["looks"]]
        for (_, a), (_, b) in zip(ours[name]["looks"], theirs["looks"], strict=True):
            assert a == pytest.approx(b, rel=1e-10)
        flags = ("early", "interrupted")
        assert [ours[name][f] for f in flags] == [theirs[f] for f in flags]


def test_two_processes_end_where_one_ends_in_float32(
    together: list[Results], alone: Results
) -> None:
    # A gradient is a sum of some 1e3 terms: in another order it differs by about sqrt(1e3) 2^-24
    # = 2e-6 of its typical entry. Adam takes steps of about the same length for every entry, and
    # one whose true gradient is near zero gets a step of which that difference is no small
    # part: entries are spread over some decades, so that a few in a hundred are hit, by a part of
    # a step. 1e-3 of the way leaves room for that; an unweighted part is wrong by 1e-1.
    assert 0 < distance(together[0]["single"], alone["single"], torch.float32) < 1e-3
    mean = alone["single"]["mean_loss"]
    assert together[0]["single"]["mean_loss"] == pytest.approx(mean, rel=1e-4)


def test_the_cases_are_what_they_say(alone: Results, together: list[Results]) -> None:
    assert alone["double"]["steps"] == STEPS
    assert len(alone["double"]["looks"]) == 3
    assert alone["stopped"]["steps"] == 3
    assert alone["stopped"]["interrupted"]
    assert not alone["stopped"]["early"]
    assert alone["patience"]["early"]
    assert alone["patience"]["steps"] < STEPS
    # Alone 7 samples in 4 pieces of at most 2; of two processes the first has 3, in 2 pieces.
    assert alone["splits"] == [2, 4]
    assert [results["splits"] for results in together] == [[2], []]


def test_a_resumed_m_step_of_two_ends_with_the_same_bits(together: list[Results]) -> None:
    for results in together:
        whole, resumed = results["double"], results["resumed"]
        assert all(torch.equal(whole["state"][n], resumed["state"][n]) for n in whole["state"])


def test_an_interrupted_m_step_goes_on_from_its_state_alone(alone: Results) -> None:
    state = TrainingState.from_tensors(alone["stopped"]["state"])
    rest = train(denoiser(torch.float64, seed=9), torch.float64, state=state)
    assert all(
        torch.equal(rest.state.tensors()[n], w) for n, w in alone["double"]["state"].items()
    )


# ---------------------------------------------------------------------------------------- pieces


def test_a_batch_that_does_not_fit_is_the_same_step_in_pieces(alone: Results) -> None:
    assert distance(alone["pieces"], alone["double"], torch.float64) < 1e-10
    assert alone["pieces"]["mean_loss"] == pytest.approx(alone["double"]["mean_loss"], rel=1e-12)


def test_memory_for_not_even_one_sample_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        train(hungry(torch.float64, 0), torch.float64)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "vectors", "strided"])
def test_dropout_of_a_part_is_the_part_of_dropout(layout: str) -> None:
    make: dict[str, Callable[[], Tensor]] = {
        "contiguous": lambda: torch.ones(9, 4, 5, 6),
        "channels last": lambda: torch.ones(9, 4, 5, 6).to(memory_format=torch.channels_last),
        "vectors": lambda: torch.ones(9, 33),
        "strided": lambda: torch.ones(9, 8, 5, 6)[:, ::2],
    }
    x = make[layout]()
    dropout = Dropout(0.5)
    dropout.generator = torch.Generator().manual_seed(3)
    whole = dropout(x)
    assert 0 < (whole == 0).float().mean() < 1
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        dropout.generator.manual_seed(3)
        dropout.rows = (part, 9)
        got = dropout(x[part])
        assert torch.equal(got, whole[part])


def test_parts_cover_everything_once_and_none_is_empty() -> None:
    for n, parts in itertools.product(range(12), range(1, 15)):
        found = parts_of(slice(5, 5 + n), parts)
        rows = [row for part in found for row in range(part.start, part.stop)]
        assert rows == list(range(5, 5 + n))
        sizes = [part.stop - part.start for part in found]
        assert all(size > 0 for size in sizes)
        assert not sizes or max(sizes) - min(sizes) <= 1


def test_a_process_without_a_group_is_told_what_to_do() -> None:
    with pytest.raises(ValueError, match="init_process_group first"):
        DataParallel()
