"""Trackers are told what the commits say, once, and their faults are not the run's."""

from __future__ import annotations

import io
import json
import struct
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from pipelines.progress import SilentReporter, use_reporter
from pipelines.status import read_status
from pipelines.trackers import told_of, tracking
from storage_schemas.config import RunConfig
from storage_schemas.run_store import RunStore
from tests.command_line import diffem
from tests.pipelines.report_page import metric, plant
from tests.pipelines.test_run import make_run
from tests.storage.tiny_run import make_config

needs_tensorboard = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="needs tensorboard: pip install 'diffem[trackers]'"
)
needs_mlflow = pytest.mark.skipif(
    find_spec("mlflow") is None, reason="needs mlflow: pip install 'diffem[trackers]'"
)
needs_wandb = pytest.mark.skipif(
    find_spec("wandb") is None, reason="needs wandb: pip install 'diffem[trackers]'"
)
# What these packages warn of while they are imported or used is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

VALUES = (1.0, 0.7, 0.5, 0.3)
TOLD = [(-1, 1.0), (0, 0.7), (1, 0.5), (2, 0.3)]


class Notes(SilentReporter):
    """Keeps the lines that the run would print."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def notes() -> Iterator[Notes]:
    kept = Notes()
    with use_reporter(kept):
        yield kept


def planted(url: Path, *trackers: dict[str, Any], steps: int = 4) -> RunStore:
    """A run with a start and some iterations, and one number that is not known."""
    numbers = [{"divergence": metric(v, 0.01), "psnr_mean": metric(None)} for v in VALUES[:steps]]
    return plant(str(url), numbers, iterations=3, trackers=trackers)


def follow(store: RunStore) -> None:
    with tracking(store) as track:
        track()


# ------------------------------------------------------------------------------ what they are told


def test_what_is_told_is_what_the_commits_say(tmp_path: Path) -> None:
    store = planted(tmp_path / "run")
    told = [read() for _, read in told_of(store)]
    assert [t.key for t in told] == ["start", "000", "001", "002"]
    assert [t.step for t in told] == [-1, 0, 1, 2]
    assert [t.values["divergence"] for t in told] == list(VALUES)
    assert "psnr_mean" not in told[0].values
    assert told[1].values["seconds/m_step"] == store.completed()[0].stages["m_step"].seconds
    shades = [np.asarray(Image.open(io.BytesIO(t.picture or b"")))[0, 0] for t in told]
    assert shades == [0, 1, 2, 3]


def test_trackers_are_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    plain = make_config()
    tracked = make_config(trackers=({"kind": "tensorboard", "folder": "x"},))
    assert tracked.digest == plain.digest
    RunStore.create(str(tmp_path), plain)
    # The stored config is the one that was given last: a tracker can be added to a run.
    assert RunStore.create(str(tmp_path), tracked).config.trackers == tracked.trackers


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("{kind: tensorboard, folder: 's3://me:secret-of-mine@host/b'}", "holds a password"),
        ("{kind: mlflow, tracking_uri: 'https://h/?token=secret-of-mine'}", "holds a query"),
        ("{kind: comet}", "'tensorboard', 'mlflow', 'wandb'"),
    ],
)
def test_addresses_with_secrets_and_unknown_trackers_are_refused(
    tracker: str, message: str, tmp_path: Path
) -> None:
    given = ("--set", f"trackers=[{tracker}]", "--store", tmp_path / "run")
    result = diffem("run", "deploy/experiments/digits.yaml", *given)
    assert result.exit_code == 2
    told = result.stderr
    assert message in told
    assert "trackers.0" in told
    assert "secret-of-mine" not in told
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- tensorboard


def events_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = folder.iterdir()
    return EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0}).Reload()


@needs_tensorboard
def test_tensorboard_reads_every_number_and_picture_at_its_iteration(tmp_path: Path) -> None:
    folder = tmp_path / "board"
    store = planted(tmp_path / "run", {"kind": "tensorboard", "folder": str(folder)})
    follow(store)
    assert [run.name for run in folder.iterdir()] == [f"tiny-{store.config.digest[:8]}"]
    read = events_of(folder)
    divergence = read.Scalars("divergence")
    assert [event.step for event in divergence] == [-1, 0, 1, 2]
    np.testing.assert_allclose([event.value for event in divergence], VALUES, rtol=1e-6)
    assert divergence[1].wall_time == store.completed()[0].finished.timestamp()
    pictures = read.Images("held-out observations, restored")
    shades = [np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in pictures]
    assert [shade[0, 0, 0] for shade in shades] == [0, 1, 2, 3]
    assert b"random_mask" in read.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@needs_tensorboard
def test_a_run_that_goes_on_tells_only_what_is_new(tmp_path: Path, notes: Notes) -> None:
    folder = tmp_path / "board"
    tracker = {"kind": "tensorboard", "folder": str(folder)}
    follow(planted(tmp_path / "first", tracker, steps=2))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert len(before) == 2
    # The same config at another place is the same run, to a tracker: its numbers are equal.
    store = planted(tmp_path / "whole", tracker)
    follow(store)
    follow(store)
    assert notes.lines == []
    assert len([*folder.rglob("*tfevents*")]) == 4
    assert before.items() <= {p: p.stat().st_mtime_ns for p in folder.rglob("*")}.items()
    assert [event.step for event in events_of(folder).Scalars("divergence")] == [-1, 0, 1, 2]


# -------------------------------------------------------------------------------- faults of theirs


def test_a_tracker_that_fails_is_a_warning_and_is_told_again(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.trackers import telling

    class Sometimes:
        told: ClassVar[list[str]] = []
        fails = True

        def known(self) -> set[str]:
            return set(self.told)

        def tell(self, told: Any) -> None:
            if self.fails and told.key == "001":
                raise RuntimeError("no answer from https://me:secret-of-mine@host/x")
            self.told.append(told.key)

        def close(self) -> None:
            raise OSError("and this")

    monkeypatch.setattr(telling, "_opened", lambda *_: Sometimes())
    store = planted(tmp_path / "run", {"kind": "mlflow"})
    with tracking(store) as track:
        track()
        assert Sometimes.told == ["start", "000"]
        (line,) = notes.lines
        assert line.startswith("warning: the tracker mlflow was not told: RuntimeError: no answer")
        assert "secret-of-mine" not in line
        Sometimes.fails = False
        track()
    assert Sometimes.told == ["start", "000", "001", "002"]
    assert len(notes.lines) == 1


def test_a_package_that_is_missing_is_said_once(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow.tracking"):
        monkeypatch.setitem(sys.modules, name, None)
    store = planted(tmp_path / "run", {"kind": "wandb"}, {"kind": "mlflow"})
    with tracking(store) as track:
        track()
        track()
    assert len(notes.lines) == 2
    assert all("pip install 'diffem[trackers]'" in line for line in notes.lines)


@needs_tensorboard
@pytest.mark.usefixtures("prefect_server")
def test_a_run_tells_its_trackers_and_outlives_those_that_fail(
    tmp_path: Path, tiny_config: Path, notes: Notes
) -> None:
    (tmp_path / "file").write_text("a file, where a folder would have to be")
    trackers = [{"kind": "tensorboard", "folder": str(tmp_path / f)} for f in ("file", "board")]
    prior = "prior={kind: joint, samples: 16}"
    made = make_run(
        tmp_path / "run", tiny_config, f"trackers={json.dumps(trackers)}", "iterations=1", prior
    )
    assert made["complete"]
    assert any("the tracker tensorboard was not told" in line for line in notes.lines)
    status = read_status(RunStore.open(str(tmp_path / "run")))
    (read,) = (events_of(tmp_path / "board"),)
    steps = [status.start, *status.history]
    expected = [step.metrics["divergence"].value for step in steps]
    found = read.Scalars("divergence")
    assert [event.step for event in found] == [-1, 0]
    np.testing.assert_allclose([event.value for event in found], expected, rtol=1e-6)
    assert status.prior is not None
    (prior_event,) = read.Scalars("prior/divergence")
    assert prior_event.step == 0
    assert prior_event.value == pytest.approx(status.prior.metrics["divergence"].value, rel=1e-6)


# -------------------------------------------------------------------------------- mlflow and wandb


@pytest.mark.slow
@needs_mlflow
def test_mlflow_holds_each_number_once_and_the_pictures(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts of a database
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = {"kind": "mlflow", "tracking_uri": uri, "experiment": "em"}
    follow(planted(tmp_path / "first", tracker, steps=2))
    follow(planted(tmp_path / "whole", tracker))
    follow(RunStore.open(str(tmp_path / "whole")))
    assert notes.lines == []
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("em")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "divergence")
    assert sorted((entry.step, entry.value) for entry in history) == [
        *zip(range(-1, 3), VALUES, strict=True)
    ]
    pictures = client.list_artifacts(run.info.run_id, "pictures")
    assert [Path(picture.path).stem for picture in pictures] == ["000", "001", "002", "start"]
    assert "config.yaml" in [entry.path for entry in client.list_artifacts(run.info.run_id)]


@pytest.mark.slow
@needs_wandb
def test_wandb_works_offline_and_remembers_what_it_was_told(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")  # whatever the code does, nobody is called
    tracker = {"kind": "wandb", "mode": "offline", "folder": str(tmp_path / "w")}
    follow(planted(tmp_path / "first", tracker, steps=2))
    follow(planted(tmp_path / "whole", tracker))
    follow(RunStore.open(str(tmp_path / "whole")))
    assert notes.lines == []
    told = [row for file in sorted((tmp_path / "w").rglob("*.wandb")) for row in rows_of(file)]
    found = [(row["em_iteration"], row["divergence"]) for row in told]
    assert found == TOLD
    assert all("held-out observations, restored" in row for row in told)
    # Nothing was left to tell the third time, and no run of W&B's was opened for it.
    assert len([*(tmp_path / "w").rglob("*.wandb")]) == 2


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Read the history of a file of W&B's: a log of blocks of 32 KiB, as LevelDB writes them."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    place, begun, rows = 7, b"", []  # after the header of the file
    while len(data) - place > 7:
        if 32768 - place % 32768 < 7:  # no room for a header: the block ends
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4)
        begun += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(begun)
            begun = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return rows


@needs_wandb
def test_wandb_without_an_account_is_a_warning(
    tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setattr(type(wandb.api), "api_key", None, raising=False)
    follow(planted(tmp_path / "run", {"kind": "wandb", "folder": str(tmp_path / "w")}))
    (line,) = notes.lines
    assert "wandb login" in line
    assert not (tmp_path / "w").exists()


def test_every_kind_of_tracker_opens_the_tracker_of_that_kind() -> None:
    kinds = RunConfig.model_json_schema()["properties"]["trackers"]["items"]["discriminator"]
    assert set(kinds["mapping"]) == {"tensorboard", "mlflow", "wandb"}
