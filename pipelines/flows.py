"""The Prefect flows: `em_run` > `em_iteration` > E-step shards, M-step, evaluation, commit.

    em_run
      prepare        corrupt and seal the observations; fit and judge the start
      em_iteration k (a flow run of its own, so that its shards keep their records when the
      process dies)
        e_step       mapped over shards: reconstructions x_hat ~ q_theta_k(x | y), one object each
        m_step       theta_{k+1} from the reconstructions, re-corrupted
        evaluate     theta_{k+1} on held-out observations
        commit       names every object of the iteration with its checksum
      prior          a model of clean data alone, where one is wanted

The science is in `pipelines.stages`; here it is wrapped once. Tasks exchange the run's URL and
small JSON records, which Prefect keeps as JSON beside the run. What is done is decided by the
run's store alone: a stage whose manifest is missing or whose objects do not answer to it runs with
`refresh_cache`, whatever Prefect remembers; otherwise Prefect's cache answers, so that its UI
shows what was skipped.

Faults of storage and devices are tried again, with growing pauses; anything else fails at once.
Shards that can be finished are finished before an iteration fails. An end that was asked for
(`cancellation`) leaves the flow runs `Cancelled`, at a point where the same command goes on.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from typing import Any

from prefect import State, flow, tags, task
from prefect.cache_policies import NO_CACHE, RUN_ID, CacheKeyFnPolicy
from prefect.context import TagsContext, TaskRunContext
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Cancelled
from prefect.tasks import Task

from pipelines import artifacts, build, cancellation, stages, watching
from pipelines.embedded_server import has_server
from pipelines.faults import PAUSES, StageFailed, worth_retrying
from pipelines.progress import reporter, use_reporter
from pipelines.result_storage import result_storage
from pipelines.run_log import LoggingReporter
from pipelines.runners import devices, distributed
from pipelines.runners.choice import (
    open_runner,
    shard_resources,
    task_runner,
    trains_from_here,
)
from pipelines.signals import PATIENCE
from pipelines.trackers import tracking
from storage_schemas.config import BudgetStop, RunConfig, StoreData
from storage_schemas.lease import RunLease
from storage_schemas.redaction import without_secrets
from storage_schemas.run_store import RunStore

__all__ = ["advance_run", "em_iteration", "em_run", "stage_task"]

Json = dict[str, Any]


def _key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Name a stage by what determines its result, never by the run's URL or the code's text."""
    values = [str(parameters[name]) for name in sorted(parameters) if name != "run_url"]
    return "-".join(["diffem", context.task.name, *values])


def _on_a_device(stage: Callable[..., Any]) -> Callable[..., Any]:
    """Run a stage on a device that is free, and end it as cancelled if an end was asked for."""

    @functools.wraps(stage)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(stage).bind(*args, **kwargs).args
        pool = devices.current()
        try:
            cancellation.check()
            if pool is None or distributed.trains_together(stage.__name__, given[0]):
                return stage(*given)
            return pool.call(stage.__name__, *given)
        except cancellation.Cancelled as reason:
            return Cancelled(message=f"stopped at a resumable point: {reason}")

    return run


def stage_task(stage: Callable[..., Any], name: str, run_name: str) -> Task[..., Any]:
    """Wrap a stage whose result is a small record, cached by digests.

    Arguments:
        stage: A function of JSON-able arguments, of which `run_url` is no part of the cache's key.
        name: Name of the task, a part of the key.
        run_name: Template of the task run's name.
    """
    wrap = task(
        name=name,
        task_run_name=run_name,
        cache_policy=CacheKeyFnPolicy(cache_key_fn=_key),
        persist_result=True,
        result_serializer="json",
        retry_condition_fn=worth_retrying,
        retry_delay_seconds=list(PAUSES),
    )
    return wrap(_on_a_device(stage))


def _always(stage: Callable[..., Any], name: str) -> Task[..., Any]:
    """Wrap a stage that looks into the store at every run."""
    wrap = task(
        name=name,
        task_run_name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retry_condition_fn=worth_retrying,
        retry_delay_seconds=list(PAUSES),
    )
    return wrap(_on_a_device(stage))


task_recover = _always(stages.recover, "check the run")
task_observations = _always(stages.prepare_observations, "observations")
task_follow = _always(stages.follow_observations, "new observations")
task_start = _always(stages.fit_start, "start")
task_commit = _always(stages.commit_iteration, "commit")
task_prior = _always(stages.fit_prior, "prior")
task_report = task(
    name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False
)(stages.write_report)
# A retried flow run matches its subflows by the order of the calls, so it has to make the same
# calls as before.
task_first_unfinished = task(
    name="first unfinished iteration",
    cache_policy=RUN_ID,
    persist_result=True,
    result_serializer="json",
)(stages.first_unfinished_iteration)
task_e_step = stage_task(stages.e_step_shard, "e_step", "E-step, shard {shard:05d}")
task_m_step = stage_task(stages.refine_model, "m_step", "M-step")
task_evaluate = stage_task(stages.evaluate_iteration, "evaluate", "evaluation")


@flow(
    name="em_iteration",
    flow_run_name="{name} · iteration {iteration:03d}",
    persist_result=False,
)
def em_iteration(run_url: str, iteration: int, name: str = "EM") -> Json | State[Json]:
    """Do what is left of one EM iteration: E-step shards, M-step, evaluation, commit.

    Arguments:
        run_url: Path or URL of a run.
        iteration: EM iteration, from 0.
        name: Name of the run, for the flow run's name.

    Returns:
        What was found done: shards of the E-step, and whether the M-step and the evaluation were.
    """
    try:
        # Tags of tasks would be looked up as concurrency limits, for every shard.
        with TagsContext(current_tags=set()):
            return _iterate(run_url, iteration)
    except (CancelledRun, cancellation.Cancelled) as reason:
        return Cancelled(message=str(reason))
    except (KeyboardInterrupt, TerminationSignal):
        cancellation.request("interrupted")
        raise


def _iterate(run_url: str, iteration: int) -> Json:
    if stages.is_complete(run_url, iteration):
        return {"complete": True}
    store = RunStore.open(run_url)
    config = store.config
    options = _options(store)
    plan = stages.lay_out_iteration(run_url, iteration)
    digest, missing = plan["config_digest"], set(plan["missing"])

    name = f"{config.name}, EM iteration {iteration:03d}"
    with artifacts.showing_progress(
        f"{config.name}-e-step", f"E-step of {name}", plan["missing_samples"]
    ):
        _reconstruct(run_url, iteration, plan, config, options)

    digest_in = stages.reconstructions_digest(run_url, iteration)
    m_step_done = stages.is_done(run_url, iteration, "m_step", digest_in)
    with ExitStack() as shown:
        if not m_step_done:
            steps = build.m_step_length(config, iteration)
            shown.enter_context(
                artifacts.showing_progress(f"{config.name}-m-step", f"M-step of {name}", steps)
            )
        train = task_m_step.with_options(refresh_cache=not m_step_done, **options)
        arguments = (run_url, iteration, digest, digest_in)
        if trains_from_here(config.runner):
            trained: Any = train(*arguments, return_state=True)
            trained.result()
        else:
            _wait(train, *arguments, resources=shard_resources(config.runner))
    model = stages.model_digest(run_url, iteration)
    evaluate_done = stages.is_done(run_url, iteration, "evaluate", model)
    evaluate = task_evaluate.with_options(refresh_cache=not evaluate_done, **options)
    resources = shard_resources(config.runner)
    _wait(evaluate, run_url, iteration, digest, model, resources=resources)
    commit = task_commit.with_options(**_without_storage(options))
    _wait(commit, run_url, iteration, plan["shards"] - len(missing))
    artifacts.show_iteration(run_url, iteration)
    return {
        "complete": False,
        "shards_reused": plan["shards"] - len(missing),
        "m_step_reused": m_step_done,
        "evaluate_reused": evaluate_done,
    }


def _reconstruct(
    run_url: str, iteration: int, plan: Json, config: RunConfig, options: Json
) -> None:
    """Map the E-step over all shards, and wait for every one of them.

    Raises:
        StageFailed: Some shards failed; the others are finished.
        CancelledRun: An end was asked for.
    """
    missing = set(plan["missing"])
    with shard_resources(config.runner):
        shards: list[PrefectFuture[Any]] = [
            task_e_step.with_options(refresh_cache=shard in missing, **options).submit(
                run_url, iteration, shard, plan["config_digest"], plan["parent_digest"]
            )
            for shard in range(plan["shards"])
        ]
    failed: dict[int, BaseException] = {}
    stopped: CancelledRun | None = None
    for number, shard in enumerate(shards):
        try:
            _result(shard)
        except CancelledRun as reason:
            stopped = reason
        except Exception as error:
            failed[number] = error
    if stopped is not None:
        raise stopped
    if failed:
        number, first = next(iter(failed.items()))
        if len(failed) == 1 and isinstance(first, ValueError):
            raise first
        names = ", ".join(f"{n:05d}" for n in list(failed)[:8])
        raise StageFailed(
            f"iteration {iteration:03d}: {len(failed)} of {len(shards)} E-step shards failed "
            f"({names}{', ...' if len(failed) > 8 else ''}); shard {number:05d}: "
            f"{type(first).__name__}: {without_secrets(str(first))}"
        ) from first


@flow(name="em_run", persist_result=False)
def em_run(
    run_url: str,
    take_over: bool = False,
    iterations_per_flow_run: int | None = None,
    time_budget: timedelta | None = None,
) -> Json | State[Json]:
    """Bring a run to its end: do what its store does not hold yet.

    Arguments:
        run_url: Path or URL of a run that exists (`diffem run` creates it from a config).
        take_over: Take the run's lease over from an owner that is known to be dead.
        iterations_per_flow_run: End after so many EM iterations; none by default.
        time_budget: Begin no EM iteration after this time; none by default.

    Returns:
        The iterations that had work left, with what was found done in them.
    """
    try:
        return advance_run(
            run_url,
            take_over=take_over,
            iterations_per_flow_run=iterations_per_flow_run,
            time_budget=time_budget,
        )
    except CancelledRun as reason:
        return Cancelled(message=str(reason))


def advance_run(
    run_url: str,
    *,
    take_over: bool = False,
    iterations_per_flow_run: int | None = None,
    time_budget: timedelta | None = None,
) -> Json:
    """Do what is left of a run, or a part of it, inside any Prefect flow.

    Arguments:
        run_url: Path or URL of a run that exists.
        take_over: Take the run's lease over from an owner that is known to be dead.
        iterations_per_flow_run: Do at most so many EM iterations.
        time_budget: Begin no EM iteration after this time; the first one always begins.

    Returns:
        `complete` (nothing is left), `reason` (why it ended before its last iteration, in words),
        what was `check`ed and found, `start_reused`, `iterations` that had work left,
        `prior_reused`.

    Raises:
        LeaseHeld: Another process is writing the run.
        CancelledRun: An end was asked for; everything is at a resumable point.
        StageFailed: A stage failed for good.
        ValueError: The caller made a mistake.
    """
    began = time.monotonic()
    cancellation.begin()
    store = RunStore.open(run_url)
    config = store.config
    with ExitStack() as stack:
        lease = stack.enter_context(
            RunLease(store.objects, owner="diffem run", take_over=take_over)
        )
        if has_server():
            watching.watch()
            stack.enter_context(watching.noticing_cancellation())
            if crashed := watching.mark_abandoned(run_url):
                get_run_logger().warning(
                    "%d flow runs of a process that was killed are marked as crashed", crashed
                )
        stack.enter_context(use_reporter(LoggingReporter(reporter())))
        stack.enter_context(open_runner(config.runner))
        options = _options(store)
        direct = _without_storage(options)
        track = stack.enter_context(tracking(store))
        try:
            check = _wait(task_recover.with_options(**direct), run_url)
            _wait(task_observations.with_options(**direct), run_url)
            start = _wait(task_start.with_options(**direct), run_url)
            first = task_first_unfinished.with_options(result_storage=options["result_storage"])(
                run_url
            )
            last = config.iterations
            if iterations_per_flow_run is not None:
                last = min(last, first + iterations_per_flow_run)
            done: dict[str, Json] = {}
            reason = f"{last} of {config.iterations} EM iterations, as many as one flow run does"
            follows = isinstance(config.data, StoreData) and config.data.follow
            decision = _decision(run_url, config)
            track()
            for iteration in range(first, last):
                if decision["stop"]:
                    break
                lease.check()
                cancellation.check()
                spent = timedelta(seconds=time.monotonic() - began)
                if done and time_budget is not None and spent >= time_budget:
                    reason = f"the time budget of {time_budget} is used up"
                    last = iteration
                    break
                if follows:
                    _wait(task_follow.with_options(**direct), run_url)
                done[str(iteration)] = _run_iteration(run_url, iteration, config, options)
                track()
                decision = _decision(run_url, config)
            complete = last == config.iterations or decision["stop"]
            if decision["stop"]:
                store.write_stop(best=decision["best"], reason=decision["reason"])
            if complete and "reason" in decision:
                reporter().note(decision["reason"])
            prior: Json = {}
            if complete and config.prior is not None:
                prior = _wait(task_prior.with_options(**direct), run_url)
                track()
            if done and has_server():
                _report(store)
        except cancellation.Cancelled as asked:
            raise CancelledRun(str(asked)) from asked
        except (KeyboardInterrupt, TerminationSignal):
            cancellation.request("interrupted")
            raise
    return {
        "complete": complete,
        "reason": decision["reason"] if decision["stop"] else "" if complete else reason,
        "check": check,
        "start_reused": start["reused"],
        "iterations": done,
        "prior_reused": bool(prior.get("reused")),
    }


def _report(store: RunStore) -> None:
    """Write the report that the UI links to; without one a run is none the worse."""
    state: Any = task_report(store.address, return_state=True)
    if state.is_completed():
        artifacts.show_report(store)
    else:
        get_run_logger().warning(
            "the report was not written (%s); diffem report writes it", state.message
        )


def _decision(run_url: str, config: RunConfig) -> Json:
    """Ask the stopping rule; one that never stops need not read all iterations each time."""
    if isinstance(config.stop, BudgetStop):
        return {"stop": False}
    return stages.decide_stop(run_url)


def _run_iteration(run_url: str, iteration: int, config: RunConfig, options: Json) -> Json:
    """Start one EM iteration as a flow run of its own."""
    run = em_iteration.with_options(
        task_runner=task_runner(config.runner), result_storage=options["result_storage"]
    )
    with tags(watching.TAG, watching.run_tag(run_url), config.name):
        # A plain call would return the state of a cancelled flow run, and not raise.
        state: Any = run(run_url, iteration, config.name, return_state=True)
    found: Json = state.result()
    return found


def _wait(
    work: Task[..., Any], *args: Any, resources: AbstractContextManager[Any] | None = None
) -> Any:
    """Run a task beside this thread, which stays free to hear signals, and return its result."""
    with resources or nullcontext():
        future = work.submit(*args)
    return _result(future)


def _result(future: PrefectFuture[Any]) -> Any:
    """Return a task's result, or raise what it ended with.

    Raises:
        CancelledRun: It ended as cancelled.
        KeyboardInterrupt, TerminationSignal: This process is to end; the task has had some seconds
            to come to a resumable point.
    """
    try:
        return future.result()
    except (KeyboardInterrupt, TerminationSignal):
        cancellation.request("interrupted")
        future.wait(timeout=PATIENCE)
        raise


def _options(store: RunStore) -> Json:
    """Return what tasks take from the config: repetitions, a time limit, where records go."""
    runner = store.config.runner
    return {
        "retries": runner.retries,
        "timeout_seconds": runner.stage_timeout,
        "result_storage": result_storage(store.objects),
    }


def _without_storage(options: Json) -> Json:
    """Return the options of a task whose result is not kept."""
    return {name: value for name, value in options.items() if name != "result_storage"}
