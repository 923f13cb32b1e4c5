"""Runs whose numbers are planted, for tests of the report, and a reader of the page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image

from storage_schemas.metrics import Metric, Metrics
from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore
from tests.storage.tiny_run import (
    PROVENANCE,
    draw,
    lay_out,
    make_block,
    make_config,
    make_stage,
)

IMAGES = (1, 8, 8)


def png(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (60, 40), shade).save(data, "png")
    return data.getvalue()


def metric(value: float | None, error: float | None = None, **fields: Any) -> Metric:
    given: dict[str, Any] = {"long_name": "a number", "better": "lower", **fields}
    return Metric(value=value, standard_error=error, **given)


def plant(
    url: str | ObjectStore,
    metrics: Sequence[Mapping[str, Metric]],
    *,
    iterations: int | None = None,
    pictures: bool = True,
    **config: Any,
) -> RunStore:
    """Write a run whose start and iterations have these numbers; the first are the start's."""
    wanted = max(len(metrics) - 1, 1) if iterations is None else iterations
    store = RunStore.create(url, make_config(iterations=wanted, **config), PROVENANCE)
    block = make_block(0, 20)
    store.write_observations([block], x_shape=block.y.shape[1:], source="test")
    for place, values in enumerate(metrics):
        numbers = Metrics(values=dict(values))
        if place == 0:
            start = store.start()
            record = start.write_tensors("model", {"mean": np.zeros(4, np.float32)})
            fit = make_stage("fit", objects={"model.safetensors": record})
            start.write_metrics(numbers)
            if pictures:
                start.write_bytes("preview.png", png(0))
            start.commit(metrics=numbers, stages={"fit": fit})
            continue
        folder = lay_out(store, place - 1)
        for shard in folder.missing_shards():
            draw(folder, shard)
        folder.write_tensors("model", {"w": np.full(4, place, np.float32)})
        folder.write_metrics(numbers)
        if pictures:
            folder.write_bytes("preview.png", png(place))
        folder.commit(
            metrics=numbers, stages={"m_step": make_stage("m_step"), "evaluate": make_stage("e")}
        )
    return store


class Page(HTMLParser):
    """What tests look at: links, text, the numbers of tables, and drawn curves."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.links: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.numbers: dict[tuple[str, str], list[float]] = {}
        self.paths: dict[str, str] = {}
        self.points: dict[str, int] = {}
        self._metric = self._step = self._group = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._open.append(tag)
        self.links += [
            value
            for name, value in given.items()
            if name in ("src", "href", "srcset", "poster", "action", "data", "xlink:href")
        ]
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "section":
            self._metric = ""
        if "data-metric" in given:
            self._metric = given["data-metric"]
        if "data-step" in given:
            self._step = given["data-step"]
        if tag == "data":
            key = (self._metric, self._step)
            self.numbers.setdefault(key, []).append(float(given["value"]))
        if tag == "g" and "id" in given:
            self._group = given["id"]
        if tag == "path" and self._group.endswith("-series"):
            self.paths[self._group] = given.get("d", "")
        if tag == "use" and given.get("class") == "point":
            self.points[self._metric] = self.points.get(self._metric, 0) + 1

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            return
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data.strip())
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())
