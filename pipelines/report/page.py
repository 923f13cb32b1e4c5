"""The page: one HTML file without a reference to anything outside it."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipelines.report.figures import draw_bins, draw_curve, draw_spectra, draw_stages
from pipelines.report.reading import Report, Step
from pipelines.report.series import GROUPS, Series, collect, heading
from pipelines.report.spectra import Spectra
from pipelines.report.words import interval_of, number, told, verdict
from storage_schemas.redaction import without_secrets

__all__ = ["render_report"]

_STAGES = {
    "fit": "fit",
    "e_step": "E-step",
    "m_step": "M-step",
    "evaluate": "evaluation",
}


def render_report(report: Report, spectra: Spectra | None = None) -> str:
    """Return the page of a run.

    Arguments:
        report: The run.
        spectra: Its spectra, where it has any.

    Returns:
        HTML that depends on nothing but the arguments: no time, no order of anything.
    """
    curves = collect(report.steps)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "told": told, "heading": heading}
    environment.globals |= {"interval_of": interval_of}
    pictures = [_picture(step) for step in report.steps if step.picture is not None]
    best = report.best
    featured = next((picture for picture in pictures if picture["step"] is best), None)
    if featured is None and pictures:
        featured = pictures[-1]
    return environment.get_template("page.html.j2").render(
        css=Markup(_text("page.css")),
        script=Markup(_text("page.js")),
        report=report,
        status=report.status,
        title=report.status.name,
        description=without_secrets(report.config.description),
        shown=_shown(report),
        chip=_chip(report),
        findings=verdict(report, curves),
        tiles=_tiles(report, curves),
        groups=_groups(report, curves),
        pictures=pictures,
        featured=featured,
        first=pictures[0] if pictures else None,
        left_out=sum(s.state == "complete" for s in report.steps) - len(pictures),
        spectra=spectra,
        spectra_plots=_spectra_plots(spectra),
        stages=_stages(report),
        prior=report.prior,
        config=without_secrets(
            yaml.safe_dump(
                report.config.model_dump(mode="json"),
                sort_keys=False,
                allow_unicode=True,
                width=10**6,
            )
        ),
        facts=_facts(report),
    )


def _shown(report: Report) -> str:
    """Say what the pictures show, for those who cannot see them."""
    seal = report.observations
    if seal is not None and len(seal.x_shape) == 1:
        return "scatter plots of reconstructions, beside clean samples where these are known"
    truth = "clean images, " if seal is not None and seal.truth else ""
    return (
        f"rows of {truth}observations, posterior samples, their mean, and their standard "
        "deviation pixel by pixel"
    )


def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf-8")


def _chip(report: Report) -> dict[str, str]:
    status = report.status
    if status.method == "clean":
        return {"kind": "caution", "text": "ceiling: clean samples"}
    if status.stopped is not None:
        return {"kind": "good", "text": f"stopped after {status.complete} iterations"}
    if status.state == "complete":
        return {"kind": "good", "text": f"{status.complete} iterations, complete"}
    return {"kind": "plain", "text": f"{status.complete} of {status.iterations} iterations"}


def _tiles(report: Report, curves: list[Series]) -> list[dict[str, str]]:
    """Choose the few numbers that stand above everything."""
    by_name = {series.name: series for series in curves}
    tiles: list[dict[str, str]] = []
    for name in ("divergence", "psnr_mean", "hidden_rmse_mean", "rmse_mean", "distance"):
        series = by_name.get(name)
        if series is None or not series.known or len(tiles) == 3:
            continue
        first, last = series.known[0], series.known[-1]
        unit = f" {series.units}" if series.units else ""
        notes = []
        if first is not last:
            notes.append(f"{number(first.metric.value or 0.0)} at {first.step.place}")
        notes += [
            f"{called} {number(metric.value)}"
            for called, metric in series.references
            if metric.value is not None
        ]
        tiles.append(
            {
                "label": f"{heading(name)}, {last.step.name}",
                "value": f"{number(last.metric.value or 0.0)}{unit}",
                "note": " · ".join(notes),
            }
        )
    steps = [*report.steps, *([report.prior] if report.prior is not None else [])]
    seconds = sum(stage.seconds for step in steps for stage in step.stages.values())
    tiles.append({"label": "Computing", "value": _duration(seconds), "note": "all stages, summed"})
    return tiles


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _groups(report: Report, curves: list[Series]) -> list[dict[str, Any]]:
    groups = []
    for group in GROUPS:
        cards = [_card(series, report) for series in curves if series.group == group.key]
        if cards:
            groups.append({"group": group, "cards": cards})
    return groups


def _card(series: Series, report: Report) -> dict[str, Any]:
    last = series.last
    bins = last.bins if last.value is not None else None
    return {
        "series": series,
        "title": heading(series.name),
        "plot": Markup(draw_curve(series, report.steps)) if series.known else None,
        "summary": _summary(series),
        "bins": bins,
        "bins_plot": Markup(draw_bins(series.name, bins)) if bins else None,
    }


def _summary(series: Series) -> str:
    """Say in words what the drawing shows."""
    known = series.known
    if not known:
        return f"{heading(series.name)}: {series.last.long_name}"
    parts = [f"{heading(series.name)}: {told(known[0].metric)} at {known[0].step.place}"]
    if len(known) > 1:
        parts.append(f"{told(known[-1].metric)} at {known[-1].step.place}")
    parts += [
        f"{called} {told(metric)}"
        for called, metric in series.references
        if metric.value is not None
    ]
    if series.target is not None:
        parts.append(f"{series.target:g} is right")
    return "; ".join(parts)


def _picture(step: Step) -> dict[str, Any]:
    assert step.picture is not None
    width, height = struct.unpack(">II", step.picture[16:24])
    return {
        "step": step,
        "source": Markup("data:image/png;base64," + base64.b64encode(step.picture).decode()),
        "width": width,
        "height": height,
    }


def _spectra_plots(spectra: Spectra | None) -> list[dict[str, Any]]:
    if spectra is None:
        return []
    plots = []
    for key, title, lead, curves in (
        (
            "observations",
            "Observations",
            "Held-out observations, and reconstructions corrupted with the same operators.",
            spectra.observations,
        ),
        ("images", "Images", "Reconstructions before they are corrupted.", spectra.images),
    ):
        if curves:
            plots.append(
                {
                    "title": title,
                    "lead": lead,
                    "curves": curves,
                    "plot": Markup(draw_spectra(key, spectra.frequencies, curves)),
                }
            )
    return plots


def _stages(report: Report) -> dict[str, Any] | None:
    steps = [step for step in (*report.steps, report.prior) if step is not None and step.stages]
    if not steps:
        return None
    names = [name for name in _STAGES if any(name in step.stages for step in steps)]
    rows = [
        (
            step.short,
            [step.stages[n].seconds if n in step.stages else 0.0 for n in names],
        )
        for step in steps
    ]
    titles = [_STAGES[name] for name in names]
    return {
        "steps": steps,
        "names": names,
        "titles": titles,
        "plot": Markup(draw_stages(rows, titles)),
    }


def _facts(report: Report) -> list[tuple[str, str]]:
    """Return where the run comes from, line by line."""
    made = report.provenance
    facts = [
        ("run", report.status.run),
        ("created", f"{report.created:%Y-%m-%d %H:%M} UTC"),
    ]
    if report.finished is not None:
        facts.append(("last commit", f"{report.finished:%Y-%m-%d %H:%M} UTC"))
    facts += [
        ("diffem", made.code_version),
        ("Python", made.python),
        ("platform", made.platform),
        ("method", report.status.method),
        ("config digest", report.status.config_digest),
    ]
    seal = report.observations
    if seal is not None:
        facts.append(("observations", f"{seal.samples:,}"))
        facts.append(("clean sample", " × ".join(map(str, seal.x_shape))))
        facts.append(("observation", " × ".join(map(str, seal.y_shape))))
        used = "learned from" if report.status.method == "clean" else "for evaluation only"
        facts.append(("truth", f"known, {used}" if seal.truth else "not known"))
        if seal.source:
            facts.append(("source", without_secrets(seal.source)))
    models = [step for step in report.steps if step.model_digest is not None]
    if models:
        facts.append((f"model of {models[-1].name}", str(models[-1].model_digest)))
    facts += [(name, version) for name, version in made.packages.items()]
    return facts
