"""What the report looks like in a real browser, on a desk and on a phone: headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from storage_schemas.run_store import RunStore
from tests.pipelines.report_page import metric, plant
from tests.pipelines.test_run import make_run
from tests.storage.servers import node_modules

pytestmark = pytest.mark.slow

DESK, PHONE = 1300, 390


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, prefect_server: None
) -> RunStore:
    url = tmp_path_factory.mktemp("runs") / "tiny"
    make_run(url, tiny_config)
    result = CliRunner().invoke(app, ["report", str(url), "--open-nothing"])
    assert result.exit_code == 0, result.output
    return RunStore.open(str(url))


class Shown:
    """A page, with all that it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())


@pytest.fixture
def show(browser: Any, run: RunStore) -> Iterator[Any]:
    opened: list[Shown] = []
    assert run.objects.local_path is not None
    page = run.objects.local_path / "report.html"

    def open_it(width: int = DESK, path: Path = page, **options: Any) -> Shown:
        shown = Shown(browser, path, viewport={"width": width, "height": 844}, **options)
        opened.append(shown)
        return shown

    yield open_it
    for shown in opened:
        shown.page.close()


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_it_opens_without_an_error_and_asks_for_nothing(show: Any, width: int) -> None:
    shown = show(width)
    shown.page.wait_for_timeout(200)
    assert shown.said == []
    assert [url for url in shown.asked if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in shown.asked if url.startswith("file:")]) == 1


def test_every_curve_is_drawn(show: Any, run: RunStore) -> None:
    page = show().page
    metrics = run.iteration(1).metrics()
    assert metrics is not None
    curves = page.locator("path[id]").count()
    series = page.locator("g[id$='-series'] path")
    assert curves > 0
    names = {name for name in metrics.values if page.locator(f"#curve-{name}-series").count()}
    assert {"divergence", "psnr_mean", "distance"} <= names
    lengths = series.evaluate_all("paths => paths.map(path => path.getTotalLength())")
    assert len(lengths) == len(names)
    assert min(lengths) > 50  # of a plot that is about 230 points wide


def test_pictures_are_drawn_large_and_sharp(show: Any) -> None:
    page = show().page
    for place in range(2):
        image = page.locator(".pair img").nth(place)
        assert image.evaluate("image => image.complete && image.naturalWidth") > 300
        assert image.bounding_box()["width"] > 450


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_nothing_runs_off_the_side_even_with_everything_unfolded(show: Any, width: int) -> None:
    page = show(width).page
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".card").first.bounding_box()["width"] > 300


def test_the_value_of_a_point_shows_under_the_pointer(show: Any, run: RunStore) -> None:
    page = show().page
    metrics = run.iteration(1).metrics()
    assert metrics is not None
    point = page.locator("[data-metric=divergence] .point").last
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    tip = page.locator("#tip")
    tip.wait_for()
    told = tip.inner_text()
    assert told.startswith("iteration 001: ")
    value = metrics.values["divergence"]
    assert value.value is not None
    assert value.standard_error is not None
    shown = float(told.removeprefix("iteration 001: ").split()[0])
    assert shown == pytest.approx(value.value, abs=value.standard_error / 5)
    page.mouse.move(0, 0)
    assert not tip.is_visible()


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_a_picture_is_enlarged_and_the_keys_go_through_all(show: Any, width: int) -> None:
    page = show(width).page
    page.locator(".pair .zoom").first.click()
    viewer, name = page.locator("#viewer"), page.locator("#viewer-name")
    assert viewer.is_visible()
    assert name.inner_text() == "Start"
    image = page.locator("#viewer-image")
    small = image.bounding_box()["width"]
    image.click()
    assert image.bounding_box()["width"] > 1.05 * small
    assert image.bounding_box()["width"] > 1000
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert name.inner_text() == "Iteration 001"
    assert page.locator("#next").is_disabled()
    page.keyboard.press("Escape")
    assert not viewer.is_visible()


def test_the_slider_goes_through_the_steps(show: Any) -> None:
    page = show().page
    before = page.locator("#featured img").get_attribute("src")
    page.locator("#scrub").focus()
    page.keyboard.press("Home")
    assert page.locator("#featured-name").inner_text() == "Start"
    first = page.locator(".pair img").first.get_attribute("src")
    assert page.locator("#featured img").get_attribute("src") == first != before


def test_without_scripts_everything_is_there(show: Any) -> None:
    page = show(java_script_enabled=False).page
    assert page.locator(".pair img").count() == 2
    assert not page.locator(".player").is_visible()
    assert not page.locator("#viewer").is_visible()
    page.get_by_text("Every picture").click()
    page.locator(".gallery img").last.scroll_into_view_if_needed()
    assert page.locator(".gallery img").last.is_visible()


def test_dark_and_light_follow_the_system(show: Any) -> None:
    script = "getComputedStyle(document.body).backgroundColor"
    stroke = "getComputedStyle(document.querySelector(\"g[id$='-series'] path\")).stroke"
    light, dark = show(color_scheme="light").page, show(color_scheme="dark").page
    for expression in (script, stroke):
        assert light.evaluate(expression) != dark.evaluate(expression)


@pytest.fixture(scope="module")
def axe() -> str:
    path = node_modules() / "axe-core/axe.min.js"
    if not path.exists():
        pytest.skip(f"axe-core is not in {node_modules()}; make servers installs it there")
    return path.read_text("utf-8")


def violations(page: Any, axe: str) -> list[str]:
    page.evaluate(axe)
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 20
    return [f"{v['impact']} {v['id']}: {v['nodes'][0]['html']}" for v in found["violations"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_an_accessibility_check_finds_nothing(
    show: Any, axe: str, width: int, scheme: str
) -> None:
    page = show(width, color_scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert violations(page, axe) == []
    page.locator(".pair .zoom").first.click()
    assert violations(page, axe) == []


def test_a_page_of_warnings_passes_the_check_too(show: Any, axe: str, tmp_path: Path) -> None:
    """Findings of every kind, a metric without a value, no picture."""
    start = {"divergence": metric(0.5, 0.01), "frechet": metric(None, long_name="not known: x")}
    worse = {
        "divergence": metric(0.9, 0.01),
        "collapse": metric(1.0, long_name="warning of collapse: 2 directions"),
        "residual": metric(2.0, 0.1, long_name="square; 1 is right"),
    }
    plant(str(tmp_path / "run"), [start, worse], pictures=False)
    CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    for scheme in ("light", "dark"):
        shown = show(PHONE, tmp_path / "run/report.html", color_scheme=scheme)
        assert shown.page.locator(".finding.bad").count() == 2
        assert violations(shown.page, axe) == []
        assert shown.said == []
