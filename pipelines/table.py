"""Tables for people, on standard output: the history of a run, its status, its verification."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from pipelines.status import CEILING, RunStatus, StepStatus
from storage_schemas._base import Record

if TYPE_CHECKING:
    from storage_schemas.verify import VerifyReport

__all__ = ["Summary", "print_run", "print_status", "print_verification"]


class IterationSummary(Record):
    """What an invocation found done in an iteration."""

    complete: bool
    """Everything."""
    shards_reused: int = 0
    """Shards of the E-step."""
    m_step_reused: bool = False
    """Whether the M-step was complete."""
    evaluate_reused: bool = False
    """Whether the evaluation was complete."""


class CheckSummary(Record):
    """What was found before the work began."""

    objects: int
    """Objects that were compared with their manifests."""
    findings: tuple[str, ...]
    """Those that had to be made anew, with the reason."""


class Summary(Record):
    """What an invocation of `em_run` did; iterations that it did not touch were complete."""

    check: CheckSummary
    """What was found before the work began."""
    start_reused: bool
    """Whether the start was complete."""
    iterations: dict[int, IterationSummary]
    """Iterations that had work left."""
    prior_reused: bool = False
    """Whether a prior is wanted and was complete."""


_COLUMNS: tuple[tuple[str, str, str], ...] = (
    # metric, heading, format
    ("divergence", "divergence", "{:.3f}"),
    ("psnr_sample", "PSNR\nsample", "{:.2f}"),
    ("psnr_mean", "PSNR\nmean", "{:.2f}"),
    ("hidden_rmse_sample", "hidden RMSE\nsample", "{:.3f}"),
    ("hidden_rmse_mean", "hidden RMSE\nmean", "{:.3f}"),
    ("rmse_sample", "RMSE\nsample", "{:.3f}"),
    ("rmse_mean", "RMSE\nmean", "{:.3f}"),
    ("spread_ratio", "spread\n/ error", "{:.2f}"),
    ("distance", "distance", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
)
_FLOORS = {
    "divergence": "divergence_floor",
    "distance": "distance_floor",
    "accuracy": "accuracy_clean",
}


def print_run(status: RunStatus, summary: Summary) -> None:
    """Print the history of a run that has just been worked on, and how to look at it."""

    def reused(step: StepStatus, name: str) -> str:
        if step is status.start:
            return "reused" if summary.start_reused else ""
        if step is status.prior:
            return "reused" if summary.prior_reused else ""
        assert step.iteration is not None, "the others are iterations"
        touched = summary.iterations.get(step.iteration)
        if touched is None or touched.complete:
            return "reused"
        if name == "e_step":
            found, units = touched.shards_reused, step.stages[name].units
            return "reused" if found == units else f"{found}/{units} reused" if found else ""
        done = touched.m_step_reused if name == "m_step" else touched.evaluate_reused
        steps = step.stages[name]
        return "reused" if done else f"{steps.reused}/{steps.units} reused" if steps.reused else ""

    console = _console()
    if summary.check.findings:
        console.print("Found damaged or missing, and made anew:", style="bold")
        for line in summary.check.findings:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    _print_history(console, status, reused)
    console.print(
        f"The run is in {status.run}. Look at it:\n"
        f"  pictures     {status.run}/iterations/{max(status.complete - 1, 0):03d}/preview.png\n"
        f'  in xarray    python -c "import xarray as xr; print(xr.open_zarr('
        f"'{status.run}/iterations/{max(status.complete - 1, 0):03d}/reconstructions.zarr'))\"\n"
        f"  in Prefect   prefect server start, then open http://127.0.0.1:4200/runs\n"
        f"  numbers      diffem status {status.run} --json",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def print_status(status: RunStatus) -> None:
    """Print the status of a run."""
    console = _console()
    _print_history(console, status, lambda *_: "")
    line = f"{status.run}: {status.complete} of {status.iterations} iterations complete"
    if status.writer:
        line += f"; being written by {status.writer}"
    elif status.state != "complete":
        line += "; diffem run with its config goes on"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_history(
    console: Console, status: RunStatus, reused: Callable[[StepStatus, str], str]
) -> None:
    steps = [status.start, *status.history]
    if status.prior is not None:
        steps.append(status.prior)
    shown = [c for c in _COLUMNS if any(c[0] in step.metrics for step in steps)]
    if any("hidden_rmse_mean" in step.metrics for step in steps):
        shown = [c for c in shown if c[0] not in {"rmse_sample", "rmse_mean"}]
    title = f"{status.name}: {CEILING if status.method == 'clean' else 'EM history'}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("iteration")
    for _, heading, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("E-step s", "M-step s", "evaluation s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in steps:
        cells = [_number(step, name, form) for name, _, form in shown]
        if step is status.start:
            stages = [("fit", "e_step"), ("", ""), ("evaluate", "evaluate")]
            name = "start"
        elif step is status.prior:
            stages = [("", ""), ("fit", "m_step"), ("evaluate", "evaluate")]
            name = "prior" if step.state == "complete" else f"prior ({step.state})"
        else:
            stages = [(s, s) for s in ("e_step", "m_step", "evaluate")]
            name = f"{step.iteration:03d}" + (
                "" if step.state == "complete" else f" ({step.state})"
            )
        seconds = []
        for stage, key in stages:
            if stage in step.stages:
                note = reused(step, key)
                seconds.append(
                    f"{step.stages[stage].seconds:.1f}" + (f" ({note})" if note else "")
                )
            else:
                seconds.append("")
        table.add_row(name, *cells, *seconds)
    floors = [_number(status.start, _FLOORS.get(name, ""), form) for name, _, form in shown]
    if any(floors):
        table.add_section()
        table.add_row("floor, ceiling", *floors, "", "", "")
    console.print(table)
    metrics = status.start.metrics
    for name, heading, _ in shown:
        if name in metrics:
            text = f"{' '.join(heading.split())}: {metrics[name].long_name}"
            better = metrics[name].better
            console.print(
                f"  {text}" + (f" ({better} is better)" if better else ""),
                style="dim",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    for step in steps:
        collapse = step.metrics.get("collapse")
        if collapse is not None and collapse.value:
            console.print(
                f"  {_name(status, step)}: {collapse.long_name}",
                style="bold",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    console.print()


def _name(status: RunStatus, step: StepStatus) -> str:
    if step is status.start:
        return "start"
    return "prior" if step.iteration is None else f"iteration {step.iteration:03d}"


def _console() -> Console:
    """Return standard output, wide enough for a table where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=170)


def _number(step: StepStatus, name: str, form: str) -> str:
    metric = step.metrics.get(name)
    if metric is None or metric.value is None:
        return ""
    return form.format(metric.value)


def print_verification(run: str, report: VerifyReport) -> None:
    """Print what is missing, damaged or orphaned."""
    console = _console()
    for kind in ("missing", "damaged", "orphaned"):
        for item in getattr(report, kind):
            console.print(
                f"{kind}: {item.path}: {item.problem}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    if report.ok:
        text = f"{run}: all {report.objects} objects are as they were written"
    else:
        text = f"{run}: not as it was written; diffem run with its config repairs it"
    console.print(text, highlight=False, markup=False, soft_wrap=True)
