"""Every page: its links lead somewhere, its commands exist, its configs are ones."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipelines.cli import app
from pipelines.config_io import load_config

ROOT = Path(__file__).parent.parent


def pages() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split()
    found = [ROOT / name for name in listed if (ROOT / name).exists()]
    # Where there is no git: everything but folders of tools.
    return found or [
        path
        for path in ROOT.rglob("*.md")
        if not {".venv", "node_modules", "shared"} & set(path.relative_to(ROOT).parts)
    ]


PAGES = pages()


def text_of(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        numbered = rf"{re.escape(name)}(-\d+)?"
        same = sum(re.fullmatch(numbered, other) is not None for other in found)
        found.add(f"{name}-{same}" if same else name)
    return found


def blocks_of(page: Path, kind: str) -> list[str]:
    """Return a page's blocks of code of one kind."""
    fenced = re.compile(rf"^```{kind}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return fenced.findall(page.read_text())


def shell_lines(page: Path) -> list[str]:
    """Return the lines that begin with `diffem` in a page's blocks of shell commands."""
    lines = "\n".join(blocks_of(page, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("diffem ")]


def test_there_are_pages() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "deploy/README.md", "deploy/tutorial.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: there is no {target}"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors_of(target), f"{link}: no such heading in {target.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_is_one_that_diffem_understands(page: Path) -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in shell_lines(page):
        alone = re.split(r"; | && | > | \| ", line.replace("$SMALL", ""))[0]
        words = shlex.split(alone, comments=True)
        command = commands.get(words[1])
        assert command is not None, f"there is no command in {line!r}"
        try:
            given = command.make_context(words[1], words[2:])
        except Exception as error:  # of Typer's own copy of click, or of click
            pytest.fail(f"{line!r}: {error!r} {error}")
        config = ROOT / (given.params.get("config") or "")
        if not config.is_file():  # a page may leave its folder out
            config = ROOT / "deploy/experiments" / config.name
        if given.params.get("set_") and config.is_file():
            load_config(str(config), given.params["set_"])


SECTIONS = {"channel", "trackers", "runner", "stop", "evaluation", "e_step", "m_step", "prior"}


def test_settings_that_pages_speak_of_are_settings() -> None:
    """Blocks of YAML in pages are configs, or sections that have to be valid in one."""
    digits = str(ROOT / "deploy/experiments/digits.yaml")
    checked = 0
    for page in PAGES:
        for data in map(yaml.safe_load, blocks_of(page, "yaml")):
            if not isinstance(data, dict) or data.keys() - SECTIONS:
                continue
            for key, value in data.items():
                load_config(digits, [f"{key}={yaml.safe_dump(value, default_flow_style=True)}"])
                checked += 1
    assert checked > 0
