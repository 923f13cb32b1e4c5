"""The tables of `diffem bench core`, `e-step` and `m-step` for people."""

from __future__ import annotations

from rich.table import Table

from pipelines.bench.core import CoreBenchmark
from pipelines.bench.e_step import EStepBenchmark, EStepSpeed
from pipelines.bench.layout import new_table, wide_console
from pipelines.bench.m_step import MStepBenchmark

__all__ = ["print_core", "print_e_step", "print_m_step"]


def print_core(result: CoreBenchmark) -> None:
    """Print what was measured."""
    table = new_table(
        f"Ceilings of this machine ({_where(result.device, result.threads)})", "", "GFLOP/s"
    )
    found = result.ceilings
    table.add_row("convolution 3 x 3, float32", f"{found.convolution_float32:,.0f}")
    table.add_row("convolution 3 x 3, bfloat16", f"{found.convolution_bfloat16:,.0f}")
    table.add_row("matrices 2048, float32", f"{found.matmul_float32:,.0f}")
    table.add_row("matrices 2048, bfloat16", f"{found.matmul_bfloat16:,.0f}")
    table.add_row("memory, GB/s", f"{found.memory_gb_s:,.1f}")
    _print(table)
    table = new_table(
        "Networks",
        *("network", "work", "precision", "batch", "GFLOP/image", "images/s", "GFLOP/s"),
        *("of ceiling", "official", "peak MB"),
    )
    for speed in result.speeds:
        table.add_row(
            speed.network,
            speed.work,
            speed.precision,
            f"{speed.batch}",
            f"{speed.gflop:,.4g}",
            f"{speed.images_s:,.1f}",
            f"{speed.gflop_s:,.0f}",
            f"{speed.of_ceiling:.0%}",
            _times(speed.against_official),
            f"{speed.peak_mb:,.0f}",
        )
    _print(table)


def print_e_step(result: EStepBenchmark) -> None:
    """Print what was measured."""
    table = new_table(
        f"Drawing reconstructions ({_where(result.device, result.threads)})",
        *("network", "precision", "batch", "calls", "images/s", "images x calls/s", "GFLOP/s"),
        *("of ceiling", "noise", "official", "peak MB"),
    )
    for speed in result.speeds:
        table.add_row(
            speed.network,
            speed.precision,
            f"{speed.batch}",
            f"{speed.calls}",
            f"{speed.images_s:,.2f}",
            f"{speed.image_calls_s:,.1f}",
            f"{speed.gflop_s:,.0f}",
            f"{speed.of_ceiling:.0%}",
            f"{speed.noise:.1%}",
            _times(speed.against_official),
            f"{speed.peak_mb:,.0f}",
        )
    _print(table)
    for line in _fastest(result):
        print(line)


def _fastest(result: EStepBenchmark) -> list[str]:
    """Say which batch size is fastest, where several were measured."""
    # Beside the ceiling in the same turns: what else the machine does disturbs both.
    groups: dict[tuple[str, str], list[EStepSpeed]] = {}
    for speed in result.speeds:
        groups.setdefault((speed.network, speed.precision), []).append(speed)
    lines = []
    for (network, precision), speeds in groups.items():
        best = max(speeds, key=lambda speed: speed.of_ceiling)
        if len(speeds) > 1:
            lines.append(
                f"{network}, {precision}: fastest in batches of {best.batch}; "
                f"--set e_step.batch_size={best.batch}"
            )
    return lines


def print_m_step(result: MStepBenchmark) -> None:
    """Print what was measured."""
    table = new_table(
        f"Gradient steps ({_where(result.device, result.threads)})",
        *("network", "precision", "batch", "ms/step", "images/s", "GFLOP/s", "of ceiling"),
        *("waiting", "official", "peak MB"),
    )
    for speed in result.speeds:
        table.add_row(
            speed.network,
            speed.precision,
            f"{speed.batch}",
            f"{speed.step_ms:,.1f}",
            f"{speed.images_s:,.1f}",
            f"{speed.gflop_s:,.0f}",
            f"{speed.of_ceiling:.0%}",
            f"{speed.waiting:.2%}",
            _times(speed.against_official),
            f"{speed.peak_mb:,.0f}",
        )
    _print(table)


def _where(device: str, threads: int) -> str:
    return f"{device}, {threads} threads"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f} x"


def _print(table: Table) -> None:
    wide_console(140).print(table)
