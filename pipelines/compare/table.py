"""A comparison as a table: for a terminal, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from pipelines.compare.contenders import Method
from pipelines.compare.numbers import Cell, Comparison, Row

__all__ = ["as_markdown", "cell_text", "print_comparison"]


def cell_text(cell: Cell | None) -> str:
    """Return mean and spread with as many digits as the spread bears out; - for no number."""
    if cell is None or cell.mean is None:
        return "" if cell is None else "-"
    decimals = _decimals(cell)
    mean = f"{cell.mean:.{decimals}f}"
    text = mean if cell.spread is None else f"{mean} ± {cell.spread:.{decimals}f}"
    known = sum(value is not None for value in cell.values)
    return text if known == len(cell.values) else f"{text} ({known} of {len(cell.values)})"


def _decimals(cell: Cell) -> int:
    assert cell.mean is not None
    scale = cell.spread or abs(cell.mean) / 100
    if not scale > 0:
        return 3
    return min(6, max(0, 1 - math.floor(math.log10(scale))))


def _rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    kept = [item for item in comparison.methods if item.left_out is None]
    headings = ["metric", *(item.label for item in kept)]
    referenced = any(row.reference is not None for row in comparison.rows)
    if referenced:
        headings.append("floor, clean")
    methods: list[Method] = [item.method for item in kept]
    rows = []
    for row in comparison.rows:
        cells = [_heading(row), *(cell_text(row.cells[method]) for method in methods)]
        rows.append([*cells, cell_text(row.reference)] if referenced else cells)

    def seconds(method: Method) -> str:
        found = [one.seconds for one in comparison.outcomes if one.method == method]
        return f"{sum(found) / len(found):.0f}"

    def steps(method: Method) -> str:
        found = {one.gradient_steps for one in comparison.outcomes if one.method == method}
        return " to ".join(f"{n:,}" for n in sorted({min(found), max(found)}))

    told: list[tuple[str, Callable[[Method], str]]] = [
        ("gradient steps", steps),
        ("seconds, evaluations not counted", seconds),
    ]
    for name, of in told:
        cells = [name, *(of(method) for method in methods)]
        rows.append([*cells, ""] if referenced else cells)
    return headings, rows


def _heading(row: Row) -> str:
    unit = "" if row.units == "1" else f", {row.units}"
    arrow = {"lower": " ↓", "higher": " ↑", None: ""}[row.better]
    return f"{row.metric.replace('_', ' ')}{unit}{arrow}"


def _notes(comparison: Comparison) -> list[str]:
    n = len(comparison.seeds)
    seeds = ", ".join(map(str, comparison.seeds))
    notes = [
        f"Mean ± standard deviation over {n} seeds ({seeds}); each seed has its own held-out "
        "samples, corruptions and weights, the same for every method."
        if n > 1
        else f"One seed ({seeds}): no spread can be told."
    ]
    if any(item.method == "clean" and item.left_out is None for item in comparison.methods):
        notes.append(
            "The ceiling learned from clean samples, which nobody has in earnest; the other "
            "methods never saw one."
        )
    for item in comparison.methods:
        if item.left_out is not None:
            notes += [f"{item.label} is left out: {item.left_out}."]
    for row in comparison.rows:
        reasons = (cell.reason for cell in row.cells.values() if cell.reason is not None)
        notes += [f"{_heading(row)}: {reason}." for reason in dict.fromkeys(reasons)]
    return notes


def as_markdown(comparison: Comparison) -> str:
    """Return the table as Markdown, with its notes below."""
    headings, rows = _rows(comparison)
    lines = [_line(headings), "|---" * len(headings) + "|", *(_line(row) for row in rows), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in _notes(comparison))])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def print_comparison(comparison: Comparison) -> None:
    """Print the table on standard output, with what its metrics are."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    headings, rows = _rows(comparison)
    table = Table(box=box.SIMPLE_HEAD, title=f"{comparison.name}: compared", title_justify="left")
    table.add_column(headings[0])
    for text in headings[1:]:
        table.add_column(text, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    plain = {"highlight": False, "markup": False, "soft_wrap": True}
    for row_ in comparison.rows:
        if any(cell.mean is not None for cell in row_.cells.values()):
            console.print(f"  {_heading(row_)}: {row_.long_name}", style="dim", **plain)  # type: ignore[arg-type]
    for note in _notes(comparison):
        console.print(note, **plain)  # type: ignore[arg-type]
    console.print(f"The runs are in {comparison.store}", **plain)  # type: ignore[arg-type]
