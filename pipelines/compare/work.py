"""Making the runs of a comparison, one after the other, or finding them made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipelines.compare.contenders import Contender, Method, contenders
from pipelines.compare.numbers import Comparison, collect, result_of
from pipelines.launch import launch, require_runnable
from pipelines.status import RunStatus, read_status
from storage_schemas.config import RunConfig
from storage_schemas.objects import ObjectStore, redact_url

__all__ = ["compare"]


def compare(
    config: RunConfig,
    url: str,
    *,
    methods: Sequence[Method],
    seeds: Sequence[int],
    take_over: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Make or find every run of a comparison, and collect its numbers.

    Arguments:
        config: The config.
        url: Folder of the comparison; each run is in `METHOD-SEED` below it.
        methods: Which methods.
        seeds: Which seeds.
        take_over: Whether leases that seem alive may be taken over.
        say: Called with a line about what is being done.

    Returns:
        The table.

    Raises:
        ValueError: A config describes nothing that can run, or another run is in the way; nothing
            was started.
        Interrupted: An end was asked for; the same call goes on.
        RunFailed: A run failed; what is done stays done.
    """
    chosen, left_out = contenders(config, methods, seeds)
    for item in left_out:
        say(f"{item.method} is left out: {item.reason}")
    stores = {one.folder: ObjectStore(f"{url.rstrip('/')}/{one.folder}") for one in chosen}
    for one in chosen:
        require_runnable(one.config, stores[one.folder])
    results = []
    # A start is there once its run is: whole runs come first.
    for number, one in enumerate(sorted(chosen, key=lambda one: one.start_only), start=1):
        store = stores[one.folder]
        status = _found(one, store)
        where = redact_url(store.url)
        what = f"{number} of {len(chosen)}: {one.method}, seed {one.seed}"
        if status is None:
            say(f"{what}: {where}")
            launch(
                one.config,
                store.url,
                take_over=take_over,
                iterations_per_flow_run=0 if one.start_only else None,
                show=False,
            )
            status = _found(one, store)
            assert status is not None, "a run that returns is complete"
        else:
            say(f"{what}: found complete in {where}")
        results.append(result_of(one, status))
    return collect(config.name, redact_url(url), seeds, results, left_out, methods)


def _found(one: Contender, store: ObjectStore) -> RunStatus | None:
    """Return the status of a contender's run if what it needs of it is there."""
    stored = require_runnable(one.config, store)
    if stored is None:
        return None
    status = read_status(stored)
    if one.start_only:
        return status if status.start.state == "complete" else None
    same = (stored.config.iterations, stored.config.stop) == (
        one.config.iterations,
        one.config.stop,
    )
    return status if same and status.state == "complete" else None
