"""What `diffem export` was asked for, and writing the folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, get_args

from pipelines.export.card import card
from pipelines.export.describe import describe
from pipelines.export.subject import Subject, What, choose_subject
from pipelines.using.run import open_run
from storage_schemas._base import Record
from storage_schemas.errors import StorageError
from storage_schemas.objects import ObjectStore, redact_url

__all__ = ["ExportRequest", "ExportSummary", "Format", "export"]

Format = Literal["safetensors", "torch-export", "onnx", "diffusers"]
"""A format that other tools read."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What `diffem export` was asked for."""

    run: str
    """Path or fsspec URL of the run."""
    out: str
    """Path or fsspec URL of the folder to write."""
    format: str
    """One of `Format`."""
    what: str = "posterior"
    """`posterior` or `prior`."""
    iteration: int | Literal["best"] = -1
    """EM iteration of the posterior; the last complete one by default."""
    licence: str = "unknown"
    """Licence of the weights, for the model card."""

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--format", self.format, get_args(Format)),
            ("--what", self.what, get_args(What)),
        ):
            if value not in known:
                raise ValueError(f"{option} is {value!r}; give one of {', '.join(known)}")
        if not self.licence.isprintable() or not self.licence.strip() or ":" in self.licence:
            raise ValueError(
                f"--license is {self.licence!r}; give an identifier, such as mit or cc-by-4.0"
            )


class ExportSummary(Record):
    """What was exported."""

    out: str
    """The folder."""
    format: Format
    """Its format."""
    what: What
    """Which model it is."""
    iteration: int
    """EM iteration of the model."""
    model_digest: str
    """SHA-256 of the model's file in the run."""
    files: dict[str, int]
    """Sizes of the files, by path in the folder."""
    complete_before: bool
    """Whether the same folder was there already."""


def export(request: ExportRequest) -> ExportSummary:
    """Write a model as a folder that other tools load.

    Arguments:
        request: Which, in which format, and where.

    Returns:
        What is there now.

    Raises:
        ValueError: The run has no such model, the format does not fit it, a package is missing,
            or something else is at `out`.
        DamageError: The model is not what was written.
    """
    objects = ObjectStore(request.out)
    found = _present(objects)
    run = open_run(request.run, device="cpu")
    what: What = "prior" if request.what == "prior" else "posterior"
    format_: Format = next(name for name in get_args(Format) if name == request.format)
    if format_ == "onnx":
        from pipelines.export.graph import require_onnx

        require_onnx()
    subject = choose_subject(run, what, request.iteration)
    files = _files(subject, format_)
    if subject.gaussian_prior is not None:
        from storage_schemas.tensors import encode_tensors

        files["gaussian_prior.safetensors"] = encode_tensors(subject.gaussian_prior)
    description = describe(subject, format_, files, request.licence)
    files["README.md"] = card(subject, format_, description, request.licence).encode()
    files["config.json"] = (json.dumps(description, indent=2) + "\n").encode()
    others = [name for name in found if name not in files or objects.read(name) != files[name]]
    if others:
        raise StorageError(
            f"{redact_url(request.out)} is not empty and holds something else "
            f"({', '.join(others[:5])}{', ...' if len(others) > 5 else ''}); choose another "
            "folder"
        )
    for name, data in files.items():  # config.json comes last
        if name not in found:
            objects.write(name, data)
    return ExportSummary(
        out=redact_url(request.out),
        format=format_,
        what=what,
        iteration=subject.iteration.iteration,
        model_digest=subject.model_digest,
        files={name: len(data) for name, data in sorted(files.items())},
        complete_before=len(found) == len(files),
    )


def _present(objects: ObjectStore) -> list[str]:
    if objects.local_path is not None and objects.local_path.is_file():
        raise StorageError(f"{redact_url(objects.url)} is a file; choose a folder")
    objects.sweep()
    return objects.list()


def _files(subject: Subject, format_: Format) -> dict[str, bytes]:
    match format_:
        case "safetensors":
            return {"model.safetensors": subject.weights}
        case "torch-export":
            from pipelines.export.graph import torch_export_file

            return {"model.pt2": torch_export_file(subject)}
        case "onnx":
            from pipelines.export.graph import onnx_file

            return {"model.onnx": onnx_file(subject)}
        case "diffusers":
            from pipelines.export.hub import hub_files

            return hub_files(subject)
