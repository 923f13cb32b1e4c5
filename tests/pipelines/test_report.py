"""The report: its numbers are the run's, it stands alone, and its verdict follows from them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.report import read_report, render_report
from pipelines.report.series import collect
from pipelines.report.spectra import power_spectrum, read_spectra
from pipelines.report.words import Finding, verdict
from storage_schemas.config import RandomMaskChannel
from storage_schemas.errors import DamageError
from storage_schemas.metrics import Metric
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.command_line import diffem
from tests.pipelines.report_page import Page, metric, plant, png
from tests.storage.tiny_run import PROVENANCE, make_config

REASON = "not known: every real observation is the same"


def numbers(divergence: float, *, place: int = 0) -> dict[str, Metric]:
    """Everything that a metric can have: errors, intervals, floors, bins, a reason, no value."""
    return {
        "divergence": metric(divergence, 0.01 + place / 700, units="%"),
        "divergence_floor": metric(0.1234567890123, 0.02, better=None, units="%"),
        "energy": metric(-1.5e-7 * (1 + place), interval=(-3e-7, 1e-7), p_value=0.35),
        "frechet": Metric(value=None, long_name=REASON),
        "residual": metric(
            1.01 + place / 100, interval=(0.9, 1.2), long_name="mean square; 1 is right"
        ),
        "ranks": metric(0.97, bins=(0.2, 0.3, 0.5), long_name="ranks; 1 is calibrated"),
        "collapse": metric(0.0, long_name="no collapse: reconstructions are diverse"),
        "participation": metric(7.5 + place, better=None),
        "participation_start": metric(7.5, better=None),
        "psnr_mean": metric(17.0 + place, better="higher", units="dB"),
        "something_new": metric(float(place), long_name="what nobody has thought of"),
    }


def whole_run(url: Any, **config: Any) -> RunStore:
    values = (1.0, 0.7, 0.5, 0.3)
    return plant(url, [numbers(v, place=i) for i, v in enumerate(values)], **config)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return whole_run(str(tmp_path_factory.mktemp("runs") / "planted"))


@pytest.fixture(scope="module")
def page(planted: RunStore) -> Page:
    return page_of(planted)


def page_of(store: RunStore) -> Page:
    return Page(render_report(read_report(store), read_spectra(store)))


def findings_of(store: RunStore) -> dict[str, Finding]:
    report = read_report(store)
    return {finding.key: finding for finding in verdict(report, collect(report.steps))}


# ------------------------------------------------------------------------------------ the numbers


def test_every_number_of_every_step_is_on_the_page_as_it_was_stored(
    planted: RunStore, page: Page
) -> None:
    assert planted.objects.local_path is not None
    compared = 0
    for folder in ("start", "iterations/000", "iterations/001", "iterations/002"):
        stored = json.loads((planted.objects.local_path / folder / "metrics.json").read_text())
        for name, given in stored["values"].items():
            if given["value"] is None or name in ("collapse", "participation_start"):
                continue
            base, _, floor = name.partition("_floor")
            step = "floor" if name.endswith("_floor") else folder.removeprefix("iterations/")
            assert floor == "", name
            wanted = [given[key] for key in ("value", "standard_error", "p_value")]
            assert page.numbers[base, step] == [v for v in wanted if v is not None]
            compared += 1
    assert compared == 4 * 8


def test_every_metric_is_drawn_through_each_of_its_values(page: Page) -> None:
    drawn = {"divergence", "energy", "residual", "ranks", "participation", "psnr_mean"}
    drawn |= {"something_new"}
    assert set(page.points) == drawn
    for name in drawn:
        assert page.points[name] == 4
        path = page.paths[f"curve-{name}-series"]
        assert len(re.findall(r"[ML] ", path)) == 4
        assert len(set(re.findall(r"[ML] ([\d.]+)", path))) == 4


def test_no_number_is_nan_and_what_is_not_known_says_why(page: Page) -> None:
    assert REASON in page.words
    assert not re.search(r"\b(nan|NaN|inf|None|undefined)\b", page.words)


def test_an_unknown_metric_has_a_place(page: Page) -> None:
    assert "Other numbers" in page.headings
    assert "what nobody has thought of" in page.words


def test_every_step_has_its_row_and_its_picture(page: Page) -> None:
    for step in ("start", "000", "001", "002"):
        assert ("divergence", step) in page.numbers
        assert f"picture-{step}" in page.ids
    assert len({link for link in page.links if link.startswith("data:image/png")}) == 4


# ------------------------------------------------------------------------------ it stands alone


def test_nothing_outside_the_page_is_referred_to(page: Page) -> None:
    assert len(page.links) > 20
    assert [link for link in page.links if not link.startswith(("data:", "#"))] == []
    assert not re.search(r"url\((?!#)", page.html)
    assert "@import" not in page.html
    assert "fetch(" not in page.html
    assert "default-src 'none'" in page.html


def test_links_lead_somewhere_and_ids_are_unique(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    targets = [link[1:] for link in page.links if link.startswith("#")]
    assert set(targets) <= set(page.ids)


def test_the_same_run_makes_the_same_bytes_in_another_process(
    planted: RunStore, page: Page, tmp_path: Path
) -> None:
    out = tmp_path / "again.html"
    subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "report", planted.url, "--out", str(out)],
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
        check=True,
        timeout=120,
    )
    assert out.read_text("utf-8") == page.html


def test_secrets_in_urls_are_not_shown(tmp_path: Path) -> None:
    url = "https://me:hunter2word@example.org/x?token=abcdef123"
    store = plant(str(tmp_path / "run"), [numbers(1.0)], description=f"data of {url}")
    page = page_of(store)
    assert "example.org/x" in page.words
    assert "hunter2word" not in page.html
    assert "abcdef123" not in page.html


# ---------------------------------------------------------------------------------- unusual runs


def test_a_run_without_a_start_has_a_page(tmp_path: Path) -> None:
    store = RunStore.create(str(tmp_path / "run"), make_config(), PROVENANCE)
    page = page_of(store)
    assert "No EM iteration of 2 is complete yet" in page.words
    assert "Pictures" not in page.headings


def test_a_run_with_a_start_alone_says_that_one_number_has_no_direction(tmp_path: Path) -> None:
    store = plant(str(tmp_path / "run"), [numbers(1.0)], iterations=5)
    page = page_of(store)
    assert page.points["divergence"] == 1
    assert "0 of 5 iterations" in page.words
    assert findings_of(store)["change"].title == "Whether it improves is not known yet"


def test_a_partial_iteration_is_shown_as_such(tmp_path: Path) -> None:
    from tests.storage.tiny_run import draw, lay_out

    store = plant(str(tmp_path / "run"), [numbers(1.0), numbers(0.8)], iterations=3)
    draw(lay_out(store, 1), 0)
    page = page_of(store)
    assert "001 (partial)" in page.words
    assert "1 of 3 EM iterations are complete" in page.words
    assert page.points["divergence"] == 2


def test_without_truth_and_pictures_nothing_of_them_is_spoken_of(tmp_path: Path) -> None:
    few = [{"divergence": metric(v, 0.01)} for v in (1.0, 0.5)]
    page = page_of(plant(str(tmp_path / "run"), few, pictures=False))
    assert "Against the truth" not in page.headings
    assert "Pictures" not in page.headings
    assert "viewer" not in page.ids
    assert "Collapse is not watched" in page.headings
    assert "Calibration unknown" in page.headings


def test_a_run_without_any_number_has_a_page(tmp_path: Path) -> None:
    page = page_of(plant(str(tmp_path / "run"), [{}, {}]))
    assert page.points == {}
    assert "Finished" in page.headings


def test_a_long_run_shows_its_ends_and_its_best_among_few_pictures() -> None:
    values = [{"divergence": metric(1.0, 0.1)}] * 28
    store = plant("memory://report-long/run", values, stop={"kind": "plateau"})
    store.write_stop(best=12, reason="divergence was best in iteration 12")
    page = page_of(store)
    shown = [i.removeprefix("picture-") for i in page.ids if i.startswith("picture-")]
    assert len(shown) <= 24
    assert {"start", "012", "026"} <= set(shown)
    assert page.points["divergence"] == 28
    assert "steps between have none here" in page.words


def test_a_run_elsewhere_is_written_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole_run("memory://report-cli/run")
    assert diffem("report", "memory://report-cli/run").stdout == "tiny-report.html\n"
    result = diffem("report", "memory://report-cli/run", "--out", "memory://report-cli/page.html")
    assert result.exit_code == 0, result.output
    from storage_schemas.objects import ObjectStore

    written = ObjectStore("memory://report-cli").read("page.html")
    assert written == (tmp_path / "tiny-report.html").read_bytes()


def test_a_report_in_its_run_is_no_damage(tmp_path: Path) -> None:
    store = whole_run(str(tmp_path / "run"))
    before = verify(store)
    result = diffem("report", tmp_path / "run", "--open-nothing")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run/report.html").stat().st_size > 10_000
    assert verify(store) == before


@pytest.mark.parametrize("arguments", [["nowhere"], ["{run}", "--out", "folder/"]])
def test_mistakes_are_said(arguments: list[str], planted: RunStore) -> None:
    result = diffem("report", *(a.format(run=planted.url) for a in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("diffem: ")


# ----------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["metrics.json", "preview.png"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_damage_is_said_and_no_page_is_written(name: str, how: str, tmp_path: Path) -> None:
    whole_run(str(tmp_path / "run"))
    path = tmp_path / "run/iterations/001" / name
    if how == "missing":
        path.unlink()
    elif name == "preview.png":
        path.write_bytes(png(77))
    else:
        path.write_text(path.read_text().replace("0.5", "0.4"))
    result = diffem("report", tmp_path / "run")
    assert result.exit_code == 1
    assert f"iterations/001/{name}" in result.stderr
    assert "`diffem run` repairs it" in result.stderr
    assert not (tmp_path / "run/report.html").exists()


def test_numbers_that_are_whole_but_not_the_committed_ones_are_damage(tmp_path: Path) -> None:
    store = whole_run(str(tmp_path / "run"))
    folders = (store.iteration(n).path("metrics.json") for n in (0, 1))
    content = store.objects.read(next(folders))
    store.objects.write(next(folders), content)
    with pytest.raises(DamageError, match="committed"):
        read_report(store)


# ---------------------------------------------------------------------------------------- verdict


@pytest.mark.parametrize(
    ("values", "error", "title"),
    [
        # in standard errors of a difference of two: 8.5 over all, 2.8 in the last step
        ((1.0, 0.8, 0.6, 0.4), 0.05, "Still improving"),
        # 3.5 over all, 0.1 in the last step
        ((1.0, 0.8, 0.76, 0.75), 0.05, "Improved, now slowing"),
        ((0.70, 0.72, 0.69, 0.71), 0.05, "Levelled off"),
        ((0.4, 0.5, 0.7, 0.9), 0.05, "Getting worse"),
        ((1.0, 0.8, 0.6, 0.4), 0.5, "Levelled off"),
    ],
)
def test_the_direction_is_told_where_uncertainty_allows(
    values: tuple[float, ...], error: float, title: str, tmp_path: Path
) -> None:
    store = plant(str(tmp_path / "run"), [{"divergence": metric(v, error)} for v in values])
    assert findings_of(store)["change"].title == title


@pytest.mark.parametrize(
    ("value", "title"), [(0.13, "At its floor"), (0.05, "At its floor"), (0.3, "Not at its floor")]
)
def test_the_floor_is_told(value: float, title: str, tmp_path: Path) -> None:
    numbers = {
        "divergence": metric(value, 0.03),
        "divergence_floor": metric(0.1, 0.02, better=None),
    }
    assert findings_of(plant(str(tmp_path / "run"), [{}, numbers]))["floor"].title == title


def test_a_collapse_is_told_with_its_reason_and_remembered(tmp_path: Path) -> None:
    fine = {"collapse": metric(0.0, long_name="no collapse: reconstructions are diverse")}
    bad = {"collapse": metric(1.0, long_name="warning of collapse: they fill 2 directions")}
    found = findings_of(plant(str(tmp_path / "a"), [fine, bad]))["collapse"]
    assert (found.kind, found.text) == ("bad", "They fill 2 directions.")
    found = findings_of(plant(str(tmp_path / "b"), [fine, bad, fine]))["collapse"]
    assert found.kind == "caution"
    assert "iteration 000" in found.text


@pytest.mark.parametrize(
    ("ends", "title"), [((0.85, 0.95), "Calibrated"), ((0.7, 0.8), "Not calibrated")]
)
def test_calibration_is_told_by_the_interval(
    ends: tuple[float, float], title: str, tmp_path: Path
) -> None:
    share = metric(sum(ends) / 2, interval=ends, long_name="share; 0.9 is calibrated", better=None)
    found = findings_of(plant(str(tmp_path / "run"), [{"coverage_90": share}]))["calibration"]
    assert found.title == title
    assert "0.9 is right" in found.items[0]


@pytest.mark.parametrize(("p", "kind"), [(0.001, "caution"), (0.03, "good"), (0.6, "good")])
def test_tests_are_held_to_one_level_together(p: float, kind: str, tmp_path: Path) -> None:
    two = {"energy": metric(0.1, p_value=p), "mmd": metric(0.1, p_value=0.5)}
    assert findings_of(plant(str(tmp_path / "run"), [two]))["tests"].kind == kind


def test_why_it_stopped_is_told_in_the_rule_s_words(tmp_path: Path) -> None:
    values = [{"divergence": metric(v, 0.01)} for v in (1.0, 0.5, 0.5)]
    store = plant(str(tmp_path / "run"), values, iterations=9, stop={"kind": "plateau"})
    store.write_stop(best=0, reason="divergence was best in iteration 0")
    found = findings_of(store)["progress"]
    assert found.title == "Stopped by its rule"
    assert "divergence was best in iteration 0" in found.text
    assert "2 of 9 EM iterations" in found.text
    assert "best iteration is 000" in found.text


# ---------------------------------------------------------------------------------------- spectra


def test_the_spectrum_of_white_noise_is_flat_at_its_variance() -> None:
    images = 3.0 * np.random.default_rng(0).normal(size=(500, 2, 16, 16))
    frequencies, power = power_spectrum(images)
    np.testing.assert_allclose(frequencies, np.arange(1, 9) / 16)
    # The mean square of a DFT coefficient has relative error 1 (complex) or sqrt(2) (real) over
    # sqrt(number). The first ring has 8 coefficients in conjugate pairs, of 1000 images and
    # bands: 1 / sqrt(4000) = 0.016; four of these.
    np.testing.assert_allclose(power, 9.0, rtol=0.064)


def test_a_wave_stands_in_the_ring_of_its_frequency() -> None:
    x = np.sin(2 * np.pi * 3 * np.arange(16) / 16)
    frequencies, power = power_spectrum(np.broadcast_to(x, (1, 1, 16, 16)))
    assert frequencies[np.argmax(power)] == 3 / 16
    assert power.max() > 1e20 * np.delete(power, np.argmax(power)).max()


def test_observed_and_corrupted_go_through_the_same_operators(planted: RunStore) -> None:
    spectra = read_spectra(planted)
    assert spectra is not None
    assert [s.name for s in spectra.images] == ["iteration 000", "iteration 002", "clean images"]
    assert [s.name for s in spectra.observations] == [
        "observed",
        "iteration 000, corrupted",
        "iteration 002, corrupted",
    ]


def test_spectra_of_observations_hold_the_mask_and_the_noise(tmp_path: Path) -> None:
    channel = RandomMaskChannel(keep=0.5, noise_std=3.0)
    spectra = read_spectra(plant(str(tmp_path / "run"), [{}, {}], channel=channel))
    assert spectra is not None
    before, after = spectra.images[0].power, spectra.observations[1].power
    # Reconstructions have variance 1, the noise 9, half of the pixels are 0: 5 times the power.
    # The 32 seen pixels tell a variance to sqrt(2 / 32) = 25 %, the images' 64 to 18 %, the ratio
    # to 31 %: two of these around 5. Without the noise it is 0.5, without the mask 10.
    assert 1.9 < sum(after) / sum(before) < 8.1
