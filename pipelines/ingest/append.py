"""Adding observations to those that are there, as a generation of their own.

Nothing that is sealed is touched: what is added counts from its own seal on, and an append that is
interrupted goes on like an ingest. It holds nothing out: a store's held-out observations are those
of its first ingest. `ingest.json` stays, and tells when the same is asked for twice.
"""

from __future__ import annotations

import time

from pipelines.ingest.base import IngestError
from pipelines.ingest.blocks import IngestWork
from pipelines.ingest.opening import opened_source
from pipelines.ingest.request import IngestRequest
from pipelines.ingest.write import IngestSummary, summary_of, what_is_there, write_generation
from storage_schemas.errors import BadObservations, DamageError
from storage_schemas.generations import generation_store, read_generations
from storage_schemas.manifests import ObservationsManifest
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.unsealed import read_progress

__all__ = ["append"]


def append(request: IngestRequest) -> IngestSummary:
    """Add observations to a store that `diffem ingest` wrote.

    Arguments:
        request: Which arrays are what, and where the store is.

    Returns:
        What is there now.

    Raises:
        ValueError: There are no complete observations to add to, the new ones are of another
            kind, or as for `ingest`.
    """
    began = time.monotonic()
    objects = ObjectStore(request.url)
    where = redact_url(request.url)
    if what_is_there(objects) is None:
        raise IngestError(
            f"{where} holds no complete observations to add to; leave out --append, or correct "
            "the URL"
        )
    try:
        seals = read_generations(objects)
    except DamageError as error:
        raise IngestError(f"{where}: {error}; delete it, and append again") from error
    with opened_source(request.source, request.corruption) as source:
        if len(seals) > 1:
            # The same that was added last, of the same source?
            before = IngestWork(request, source, seals[:-1])
            there = read_progress(generation_store(objects, len(seals) - 1))
            if (
                there is not None
                and there.source is not None
                and (there.request, there.source) == (before.digest(), source.state())
            ):
                for _ in before.blocks():  # their range
                    pass
                return summary_of(before, seals, began=began, complete_before=True)
        work = IngestWork(request, source, seals)
        _require_same_kind(where, seals[0], work)
        blocks = work.blocks()
        first = next(blocks)
        try:
            written = write_generation(
                generation_store(objects, len(seals)), work, first, blocks, None
            )
        except BadObservations as error:
            raise IngestError(
                f"{error} (another append came first: run the command again)"
            ) from error
    return summary_of(work, [*seals, written], began=began, complete_before=False)


def _require_same_kind(where: str, sealed: ObservationsManifest, work: IngestWork) -> None:
    """Refuse observations that are not of the kind that is there, before they are read."""
    pairs: dict[str, tuple[object, object]] = {
        "x_shape": (sealed.x_shape, work.x_shape),
        "y_shape": (sealed.y_shape, work.y_shape),
        "parameters": (dict(sealed.parameters), work.parameters),
        "clean samples": (sealed.truth, work.roles.x is not None),
        "classes": (sealed.labels, work.roles.label is not None),
        "units": (sealed.units, work.units),
    }
    found = [f"{name}: {a} -> {b}" for name, (a, b) in pairs.items() if a != b]
    if found:
        raise IngestError(
            f"{where} holds observations of another kind (there -> given: {'; '.join(found)}); "
            "give the same arrays, or another URL"
        )
