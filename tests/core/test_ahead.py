"""Fetching ahead: the next batch is read while this one is worked on, and changes no number."""

import threading
from typing import cast

import pytest
import torch
from torch import Tensor

from diffem_core import (
    Denoiser,
    LogNormalTime,
    RandomMask,
    Scaling,
    UNet,
    VELogLinear,
    constant_rate,
    examples,
    m_step,
)
from diffem_core.examples import Ahead, Batches


@pytest.fixture
def ahead_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "_AT_HAND", 0)


def train() -> dict[str, Tensor]:
    channel = RandomMask((1, 8, 8), keep=0.5, noise_std=0.4)
    torch.manual_seed(0)
    network = UNet(
        in_channels=1,
        condition_channels=channel.condition_channels,
        out_channels=1,
        channels=(8,),
        blocks=(1,),
        embedding=8,
        dropout=0.0,
    )
    x_hat = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 16
    result = m_step(
        Denoiser(network),
        x_hat,
        channel,
        Scaling.from_range(0, 16),
        VELogLinear(sigma_min=0.15, sigma_max=10.0),
        LogNormalTime(mean=0.3, std=1.2),
        steps=9,
        batch_size=16,
        learning_rate=constant_rate(1e-3),
        ema_decay=0.9,
        clip_norm=1.0,
        seed=3,
    )
    return result.weights


def test_weights_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train()
    monkeypatch.setattr(examples, "_AT_HAND", 0)
    ahead = train()
    assert all(torch.equal(plain[name], ahead[name]) for name in plain)


class Watched:
    """Reconstructions that note which rows were asked for, and by which thread."""

    shape = torch.Size((40, 1))

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.threads: set[str] = set()
        self.more = threading.Condition()

    def __getitem__(self, rows: Tensor) -> Tensor:
        with self.more:
            self.asked.append(rows.tolist())
            self.threads.add(threading.current_thread().name)
            self.more.notify()
        return rows[:, None].float()


@pytest.mark.usefixtures("ahead_always")
def test_the_next_batch_is_asked_for_before_it_is_wanted() -> None:
    x_hat, batches = Watched(), Batches(40, 16, seed=0)
    fetch = Ahead(cast("Tensor", x_hat), batches, steps=4)
    rows, x = fetch(0)
    assert x[:, 0].long().tolist() == rows.tolist()
    with x_hat.more:
        assert x_hat.more.wait_for(lambda: len(x_hat.asked) == 2, timeout=10)
    for step in (1, 2, 3):
        rows, x = fetch(step)
        assert x[:, 0].long().tolist() == rows.tolist()
    assert x_hat.asked == [Batches(40, 16, seed=0).rows(step).tolist() for step in range(4)]
    assert threading.current_thread().name not in x_hat.threads
    assert fetch.waited > 0
    fetch.close()
    assert not any(thread.name.startswith("diffem-ahead") for thread in threading.enumerate())


@pytest.mark.usefixtures("ahead_always")
def test_it_begins_anywhere_and_ends_early() -> None:
    x_hat, batches = Watched(), Batches(40, 16, seed=0)
    fetch = Ahead(cast("Tensor", x_hat), batches, steps=100)
    rows, _ = fetch(7)
    assert rows.tolist() == Batches(40, 16, seed=0).rows(7).tolist()
    fetch.close()


@pytest.mark.usefixtures("ahead_always")
def test_an_error_of_reading_is_raised_where_the_batch_is_wanted() -> None:
    class Broken:
        shape = torch.Size((40, 1))

        def __getitem__(self, rows: Tensor) -> Tensor:
            raise OSError(5, "the disk")

    fetch = Ahead(cast("Tensor", Broken()), Batches(40, 16, seed=0), steps=3)
    with pytest.raises(OSError, match="the disk"):
        fetch(0)
    fetch.close()


def test_few_reconstructions_are_read_where_they_are_wanted() -> None:
    x_hat = Watched()
    fetch = Ahead(cast("Tensor", x_hat), Batches(40, 16, seed=0), steps=3)
    fetch(0)
    assert x_hat.threads == {threading.current_thread().name}
    assert len(x_hat.asked) == 1
    fetch.close()
