"""What the Prefect UI shows of a run: progress bars, the history as a table, iterations in words.

Artifacts are for people: where the server cannot be reached, they are left out with one line in
the log, and the work goes on. Pictures are embedded as data URIs, the one way in which the UI
shows a picture that is no public link.
"""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
from PIL import Image
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.logging import get_run_logger

from pipelines.progress import Advance, Reporter, reporter, use_reporter
from pipelines.stages.reporting import REPORT
from pipelines.status import CEILING, RunStatus, StepStatus, read_status
from storage_schemas.metrics import REFERENCES
from storage_schemas.objects import redact_url
from storage_schemas.run_store import RunStore

__all__ = ["show_iteration", "show_report", "showing_progress"]

_SECONDS = 3.0  # between updates of a bar
_GONE_SECONDS = 600.0  # in which a server that could not be reached is not asked again
_PICTURE_BYTES = 400_000  # larger events are refused by the server

_gone_until = 0.0


@contextmanager
def showing_progress(key: str, description: str, total: int) -> Iterator[None]:
    """Show a bar in the UI while stages report to this process's reporter.

    Arguments:
        key: Key of the artifact; bars of one key are versions of one artifact.
        description: A line above it.
        total: Items that make it full, over all stages inside the context.
    """
    bar = _try(lambda: create_progress_artifact(0.0, key=_key(key), description=description))
    if bar is None:
        yield
        return
    listener = _Listener(reporter(), total, lambda percent: update_progress_artifact(bar, percent))
    with use_reporter(listener):
        yield
    _try(lambda: update_progress_artifact(bar, 100.0))


class _Listener:
    """Passes on to a reporter, and tells the sum of all progress every few seconds."""

    def __init__(self, inner: Reporter, total: int, tell: Callable[[float], Any]) -> None:
        self._inner = inner
        self._total = max(1, total)
        self._tell = tell
        self._done = 0
        self._told = time.monotonic()

    @contextmanager
    def stage(
        self, name: str, *, total: int | None, unit: str, done: int = 0
    ) -> Iterator[Advance]:
        self._done += done
        inner: AbstractContextManager[Advance] = self._inner.stage(
            name, total=total, unit=unit, done=done
        )
        with inner as advance:

            def both(items: int) -> None:
                advance(items)
                self._done += items
                if time.monotonic() - self._told > _SECONDS:
                    self._told = time.monotonic()
                    percent = min(100.0, 100.0 * self._done / self._total)
                    _try(lambda: self._tell(percent))

            yield both

    def note(self, text: str) -> None:
        self._inner.note(text)


def show_iteration(run_url: str, iteration: int) -> None:
    """Show an iteration's numbers, times and picture, and the history up to it as one table."""
    store = RunStore.open(run_url)
    status = read_status(store)
    folder = store.iteration(iteration)
    manifest = folder.manifest()
    picture = None
    if manifest is not None and "preview.png" in manifest.objects:
        picture = store.objects.read(folder.path("preview.png"))
    before = status.history[iteration - 1] if iteration else status.start
    text = _in_words(status, status.history[iteration], before, picture)
    _try(
        lambda: create_markdown_artifact(
            markdown=text,
            key=_key(f"{status.name}-iteration"),
            description=f"{status.name}, EM iteration {iteration:03d}",
        )
    )
    _show_history(status)


def show_report(store: RunStore) -> None:
    """Show where the report of a run lies, as a link."""
    name, url = store.config.name, f"{store.address}/{REPORT}"
    local = store.objects.local_path
    shown = redact_url(url if local is None else (local / REPORT).resolve().as_uri())
    text = (
        f"# {name}: report\n\n[{REPORT}]({shown})\n\n"
        "One page with all numbers, pictures and a verdict in words. A browser that does not "
        f"follow the link opens its address, on a machine that reaches it: `{shown}`. "
        f"`diffem report {redact_url(store.address)}` writes it anew."
    )
    _try(
        lambda: create_markdown_artifact(
            markdown=text, key=_key(f"{name}-report"), description=f"{name}: the report"
        )
    )


def _show_history(status: RunStatus) -> None:
    steps = [step for step in (status.start, *status.history) if step.state == "complete"]
    names = [name for name in steps[-1].metrics if not name.endswith(REFERENCES)]
    table = [
        {
            "iteration": "start" if step.iteration is None else f"{step.iteration:03d}",
            **{name.replace("_", " "): _number(step, name) for name in names},
        }
        for step in steps
    ]
    _try(
        lambda: create_table_artifact(
            table=table,
            key=_key(f"{status.name}-history"),
            description=f"{status.name}: the start and {status.complete} EM iterations",
        )
    )


def _in_words(
    status: RunStatus, step: StepStatus, before: StepStatus, picture: bytes | None
) -> str:
    name = "start" if before.iteration is None else f"{before.iteration:03d}"
    lines = [f"# {status.name}, EM iteration {step.iteration:03d} of {status.iterations}", ""]
    if status.method == "clean":
        lines += [f"**{CEILING.capitalize()}.**", ""]
    if picture is not None:
        lines += [f"![Held-out observations, restored]({_data_uri(picture)})", ""]
    lines += [f"| | {name} | {step.iteration:03d} | better |", "|---|---|---|---|"]
    shown = {k: m for k, m in step.metrics.items() if not k.endswith(REFERENCES)}
    for key, metric in shown.items():
        lines.append(
            f"| {key.replace('_', ' ')} | {_number(before, key)} | {_number(step, key)} "
            f"| {metric.better or ''} |"
        )
    seconds = ", ".join(f"{name} {stage.seconds:.1f} s" for name, stage in step.stages.items())
    lines += ["", f"Times: {seconds}. Run: `{redact_url(status.run)}`", "", "What they are:", ""]
    lines += [f"- **{key.replace('_', ' ')}**: {m.long_name}" for key, m in shown.items()]
    return "\n".join(lines)


def _data_uri(png: bytes) -> str:
    """Embed a picture, with fewer colours and pixels where it is too large for an event."""
    width = None
    while len(png) > _PICTURE_BYTES:
        image = Image.open(io.BytesIO(png)).convert("RGB")
        width = image.width if width is None else round(width * 0.8)
        image = image.resize((width, round(image.height * width / image.width)))
        buffer = io.BytesIO()
        image.quantize(128).save(buffer, "PNG", optimize=True)
        png = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _number(step: StepStatus, name: str) -> str:
    metric = step.metrics.get(name)
    if metric is None or metric.value is None:
        return ""
    error = "" if metric.standard_error is None else f" ± {metric.standard_error:.2g}"
    return f"{metric.value:.4g}{error}"


def _key(text: str) -> str:
    """Bring a name to lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _try(action: Callable[[], Any]) -> Any:
    """Show something, or leave it out; whoever works does not wait for a server that is gone.

    Prefect asks such a server again for a minute; so nobody asks it for a while after that.
    """
    global _gone_until
    if time.monotonic() < _gone_until:
        return None
    try:
        return action()
    except (httpx.HTTPError, OSError) as error:
        if isinstance(error, httpx.TransportError):
            _gone_until = time.monotonic() + _GONE_SECONDS
        get_run_logger().warning("an artifact was left out: %s", error)
        return None
