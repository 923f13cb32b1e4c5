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
small JSON records. What is done is decided by the run's store alone: a stage whose manifest is
missing or whose objects do not answer to it runs with `refresh_cache`, whatever Prefect
remembers; otherwise Prefect's cache answers, so that its UI shows what was skipped.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE, RUN_ID, CacheKeyFnPolicy
from prefect.context import TaskRunContext
from prefect.task_runners import ThreadPoolTaskRunner

from pipelines import stages
from storage_schemas.lease import RunLease
from storage_schemas.run_store import RunStore

__all__ = ["em_iteration", "em_run"]

Json = dict[str, Any]


def _key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Name a stage by what determines its result, never by the run's URL or the code's text."""
    values = [str(parameters[name]) for name in sorted(parameters) if name != "run_url"]
    return "-".join(["diffem", context.task.name, *values])


def _stage(name: str, run_name: str) -> Any:
    """Make the wrapper of a stage whose result is a small record, cached by digests."""
    return task(
        name=name,
        task_run_name=run_name,
        cache_policy=CacheKeyFnPolicy(cache_key_fn=_key),
        persist_result=True,
        result_serializer="json",
    )


def _always(name: str) -> Any:
    """Make the wrapper of a stage that looks into the store at every run."""
    return task(name=name, cache_policy=NO_CACHE, persist_result=False)


task_recover = _always("check the run")(stages.recover)
task_observations = _always("observations")(stages.prepare_observations)
task_start = _always("start")(stages.fit_start)
task_commit = _always("commit")(stages.commit_iteration)
task_prior = _always("prior")(stages.fit_prior)
# A retried flow run matches its subflows by the order of the calls, so it has to make the same
# calls as before.
task_first_unfinished = task(
    name="first unfinished iteration",
    cache_policy=RUN_ID,
    persist_result=True,
    result_serializer="json",
)(stages.first_unfinished_iteration)
task_e_step = _stage("e_step", "E-step · shard {shard:05d}")(stages.e_step_shard)
task_m_step = _stage("m_step", "M-step")(stages.refine_model)
task_evaluate = _stage("evaluate", "evaluation")(stages.evaluate_iteration)

# One device, so one shard at a time; the network uses all the cores.
_one_worker: Any = ThreadPoolTaskRunner(max_workers=1)


@flow(name="em_iteration", task_runner=_one_worker, persist_result=False)
def em_iteration(run_url: str, iteration: int) -> Json:
    """Do what is left of one EM iteration: E-step shards, M-step, evaluation, commit.

    Returns:
        What was found done: shards of the E-step, and whether the M-step and the evaluation were.
    """
    if stages.is_complete(run_url, iteration):
        return {"complete": True}
    plan = stages.lay_out_iteration(run_url, iteration)
    config, missing = plan["config_digest"], set(plan["missing"])
    shards = [
        task_e_step.with_options(refresh_cache=shard in missing).submit(
            run_url, iteration, shard, config, plan["parent_digest"]
        )
        for shard in range(plan["shards"])
    ]
    for shard in shards:
        shard.result()
    digest = stages.reconstructions_digest(run_url, iteration)
    m_step_done = stages.is_done(run_url, iteration, "m_step", digest)
    task_m_step.with_options(refresh_cache=not m_step_done)(run_url, iteration, config, digest)
    digest = stages.model_digest(run_url, iteration)
    evaluate_done = stages.is_done(run_url, iteration, "evaluate", digest)
    task_evaluate.with_options(refresh_cache=not evaluate_done)(run_url, iteration, config, digest)
    task_commit(run_url, iteration, plan["shards"] - len(missing))
    return {
        "complete": False,
        "shards_reused": plan["shards"] - len(missing),
        "m_step_reused": m_step_done,
        "evaluate_reused": evaluate_done,
    }


@flow(name="em_run", persist_result=False)
def em_run(run_url: str, take_over: bool = False) -> Json:
    """Bring a run to its end: do what its store does not hold yet.

    Arguments:
        run_url: Path or URL of a run that exists (`diffem run` creates it from a config).
        take_over: Take the run's lease over from an owner that is known to be dead.

    Returns:
        The iterations that had work left, with what was found done in them.
    """
    objects = RunStore.open(run_url).objects
    with RunLease(objects, owner="diffem run", take_over=take_over) as lease:
        config = RunStore.open(objects).config
        check = task_recover(run_url)
        task_observations(run_url)
        start = task_start(run_url)
        done: dict[str, Json] = {}
        for iteration in range(task_first_unfinished(run_url), config.iterations):
            lease.check()
            done[str(iteration)] = em_iteration.with_options(
                flow_run_name=f"{config.name} · iteration {iteration:03d}"
            )(run_url, iteration)
        prior = task_prior(run_url) if config.prior is not None else {}
    return {
        "check": check,
        "start_reused": start["reused"],
        "iterations": done,
        "prior_reused": bool(prior.get("reused")),
    }
