"""How the tables of `diffem bench` look."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["new_table", "wide_console"]


def wide_console(width: int) -> Console:
    """Return the terminal, or a page of so many characters where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def new_table(title: str, *headings: str) -> Table:
    """Begin a table: names to the left, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table
