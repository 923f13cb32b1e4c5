"""Following a store that grows: what was added to it is learned from, from an iteration on.

Before an EM iteration is laid out, the run looks whether its store of observations has
generations that it has not copied yet. They become one generation of the run, whose seal says
which iteration is the first to learn from it: the first that is not laid out. So an iteration's
observations are decided once, a run that is killed and resumed takes the same ones, and iterations
that are there already stay what they are.

What was taken stays: held-out observations, and with them all numbers of evaluations, are those of
the first generation, and so is the start, which is fitted once.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.ingest.stored import stored_generations
from pipelines.progress import reporter
from pipelines.stages.bench import Json
from pipelines.stages.observations import copy_generation, require_kept
from storage_schemas.config import StoreData
from storage_schemas.generations import generation_store
from storage_schemas.integrity import is_whole
from storage_schemas.manifests import ObservationsManifest
from storage_schemas.objects import redact_url
from storage_schemas.observations import read_seal
from storage_schemas.run_store import RunStore

__all__ = ["follow_observations", "repair_generations"]


def follow_observations(run_url: str) -> Json:
    """Take over what was added to the run's store of observations since it was last looked at.

    To be called before each iteration, after `prepare_observations`.

    Arguments:
        run_url: The run.

    Returns:
        Observations that were added now, and those that the next iteration to be laid out learns
        from; nothing where the config does not follow a store.

    Raises:
        ValueError: The store is not there, or no longer begins with what was copied from it.
    """
    store = RunStore.open(run_url)
    data = store.config.data
    if not isinstance(data, StoreData) or not data.follow:
        return {}
    own = store.generations()
    theirs = stored_generations(data)
    copied = [digest for seal in own for digest in seal.copied]
    require_kept(data, copied, [seal.data_digest for seal in theirs])
    new = theirs[len(copied) :]
    total = _learned_from(own)
    if not new:
        return {"added": 0, "training": total}
    laid_out = _laid_out(store)
    # One whose seal was lost is copied anew for the iterations that learned from it.
    lost = [iteration for iteration, samples in laid_out.items() if samples > total]
    first = min(lost) if lost else max(laid_out, default=-1) + 1
    if lost:
        new = _first_of(new, laid_out[first] - total, data, first)
    added = copy_generation(
        store,
        data,
        len(own),
        [seal.data_digest for seal in new],
        after=len(copied),
        from_iteration=first,
    ).samples
    reporter().note(
        f"{added:,} observations were added to {redact_url(data.url)}: iteration {first:03d} is "
        f"the first of {total + added:,} for training"
    )
    return {"added": added, "training": total + added}


def repair_generations(run_url: str) -> None:
    """Copy anew what is damaged or lost of observations that came later.

    Arguments:
        run_url: The run.

    Raises:
        ValueError: The store is not there, or no longer begins with what was copied from it.
    """
    store = RunStore.open(run_url)
    data = store.config.data
    if not isinstance(data, StoreData) or not data.follow:
        return
    own = store.generations()
    after = 0
    for number, seal in enumerate(own):
        part = generation_store(store.objects, number)
        if number and not is_whole(part, seal.objects, prefix="", checksum=False):
            theirs = [their.data_digest for their in stored_generations(data)]
            require_kept(data, [d for s in own[: number + 1] for d in s.copied], theirs)
            copy_generation(store, data, number, seal.copied, after=after)
        after += len(seal.copied)
    if any(samples > _learned_from(own) for samples in _laid_out(store).values()):
        follow_observations(run_url)
        if read_seal(generation_store(store.objects, len(own))) is None:
            raise ValueError(
                f"iterations of {redact_url(run_url)} learned from observations that are neither "
                f"here nor at {redact_url(data.url)}; put them back there, or start a new run"
            )
        repair_generations(run_url)


def _learned_from(seals: Sequence[ObservationsManifest]) -> int:
    """Count the training observations of some generations."""
    return sum(seal.samples - seal.holdout for seal in seals)


def _laid_out(store: RunStore) -> dict[int, int]:
    """Return how many observations each iteration learns from that is laid out already."""
    found = {}
    for number in store.iteration_numbers():
        folder = store.iteration(number)
        plan = folder.reconstructions() or folder.manifest()
        if plan is not None:
            found[number] = plan.samples
    return found


def _first_of(
    seals: Sequence[ObservationsManifest], samples: int, data: StoreData, iteration: int
) -> list[ObservationsManifest]:
    """Return the first generations of the store that make up so many training observations."""
    for number in range(1, len(seals) + 1):
        if _learned_from(seals[:number]) == samples:
            return list(seals[:number])
    raise ValueError(
        f"iteration {iteration} learned from {samples:,} observations that were added to "
        f"{redact_url(data.url)}, but no generations there are so many; put them back, or start a "
        "new run"
    )
