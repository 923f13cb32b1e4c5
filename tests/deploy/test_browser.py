"""What a run looks like in the Prefect UI, in a real browser: headless Chromium."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage_schemas.run_store import RunStore
from tests.faults.cli import run_command
from tests.prefect_server import prefect_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(browser: Any) -> Any:
    return browser.new_page(viewport={"width": 1300, "height": 1400})


@pytest.fixture(scope="module")
def shown(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path
) -> Iterator[tuple[str, RunStore]]:
    """The address of a server with the UI on which the tiny run was done, and the run."""
    home, url = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("runs") / "tiny"
    with prefect_server(home, ui=True) as environment:
        done = subprocess.run(
            run_command(tiny_config, str(url)),
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        yield environment["PREFECT_API_URL"].removesuffix("/api"), RunStore.open(str(url))


def ask(server: str, path: str) -> Any:
    request = urllib.request.Request(
        f"{server}/api/{path}", data=b"{}", headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def artifact(server: str, key: str) -> str:
    """Return the address of the page of the latest artifact of a key."""
    latest = {found["key"]: found["latest_id"] for found in ask(server, "artifacts/latest/filter")}
    return f"{server}/artifacts/artifact/{latest[key]}"


def test_an_iteration_shows_its_numbers_and_a_picture_that_is_drawn(
    page: Any, shown: tuple[str, RunStore]
) -> None:
    server, store = shown
    page.goto(artifact(server, "tiny-iteration"))
    page.get_by_text("EM iteration 001 of 2").first.wait_for()
    metrics = store.iteration(1).metrics()
    assert metrics is not None
    value = metrics.values["divergence"].value
    assert f"{value:.4g}" in page.inner_text("body")
    picture = page.locator("img[src^='data:image/png;base64,']")
    picture.wait_for()
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 300
    assert picture.bounding_box()["width"] > 300


def test_the_history_is_a_table_of_start_and_iterations(
    page: Any, shown: tuple[str, RunStore]
) -> None:
    server, _ = shown
    page.goto(artifact(server, "tiny-history"))
    page.get_by_text("Show raw data").wait_for()
    first = page.locator("tbody tr td:first-child")
    assert first.all_inner_texts() == ["start", "000", "001"]


def test_the_report_is_named_where_it_lies(page: Any, shown: tuple[str, RunStore]) -> None:
    server, store = shown
    page.goto(artifact(server, "tiny-report"))
    page.get_by_text("tiny: report").first.wait_for()
    assert store.objects.local_path is not None
    address = (store.objects.local_path / "report.html").resolve().as_uri()
    links = page.get_by_role("link", name="report.html")
    print("link:", [link.get_attribute("href") for link in links.all()])
    assert address in page.inner_text("body")
    # What stands there opens.
    page.goto(address)
    page.get_by_role("heading", name="tiny").first.wait_for()


@pytest.mark.parametrize("key", ["tiny-e-step", "tiny-m-step"])
def test_progress_is_a_bar_that_is_full_at_the_end(
    key: str, page: Any, shown: tuple[str, RunStore]
) -> None:
    server, _ = shown
    page.goto(artifact(server, key))
    page.get_by_text("Progress: 100%").wait_for()


def test_the_flow_run_of_an_iteration_lists_its_shards(
    page: Any, shown: tuple[str, RunStore]
) -> None:
    server, _ = shown
    runs = {run["name"]: run["id"] for run in ask(server, "flow_runs/filter")}
    page.goto(f"{server}/runs/flow-run/{runs['tiny · iteration 001']}")
    page.get_by_text("tiny · iteration 001").first.wait_for()
    page.get_by_text("Task Runs", exact=True).last.click()
    page.get_by_text("E-step, shard 00003").first.wait_for()
    body = page.inner_text("body")
    assert "M-step" in body
    assert "Completed" in body
