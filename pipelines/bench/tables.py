"""The tables of `diffem bench` for people."""

from __future__ import annotations

from pipelines.bench.layout import new_table, wide_console
from pipelines.bench.orchestration import OrchestrationBenchmark
from pipelines.bench.storage import StorageBenchmark
from storage_schemas.objects import redact_url

__all__ = ["print_orchestration", "print_storage"]


def print_orchestration(result: OrchestrationBenchmark) -> None:
    """Print what was measured."""
    console = wide_console(120)
    table = new_table(
        f"The same run, {result.config}; {result.rounds} rounds, load {result.load:.1f}",
        *("where", "start s", "work s", "ratio", "work processor s", "ratio"),
    )
    for way in result.ways:
        table.add_row(
            way.where,
            f"{way.start_seconds:.1f}",
            f"{way.work_seconds:.1f}",
            f"{way.ratio:.3f}",
            f"{way.work_cpu_seconds:.1f}",
            f"{way.cpu_ratio:.3f}",
        )
    console.print(table)
    table = new_table("A shard that does nothing", "where", "ms per shard", "MB per 1,000 shards")
    for cost in result.shards:
        table.add_row(cost.where, f"{cost.milliseconds:.1f}", f"{cost.memory_mb:.1f}")
    console.print(table)


def print_storage(result: StorageBenchmark) -> None:
    """Print what was measured."""
    console = wide_console(120)
    table = new_table("Codecs, one shard in memory", "codec", "ratio", "write MB/s", "read MB/s")
    for codec in result.codecs:
        table.add_row(
            codec.codec,
            f"{codec.ratio:.2f}",
            f"{codec.write_mb_s:,.0f}",
            f"{codec.read_mb_s:,.0f}",
        )
    console.print(table)
    table = new_table(
        "Stores; batches of 256 random samples",
        *("place", "samples", "MB", "objects", "ratio", "write MB/s", "read MB/s"),
        *("batches/s", "peak MB", "requests"),
    )
    for run in result.stores:
        speed = run.speed
        scheme, separator, _ = redact_url(speed.url).partition("://")
        table.add_row(
            scheme if separator else "disk",
            _samples(speed.samples, speed.x_shape),
            f"{speed.mb:,.1f}",
            f"{speed.objects}",
            f"{speed.ratio:.2f}",
            _rate(speed.write_mb_s),
            _rate(speed.read_mb_s),
            _rate(speed.minibatches_s),
            f"{run.peak_mb:,.0f}",
            "" if run.requests is None else f"{run.requests:,}",
        )
    console.print(table)
    plan = result.plan
    console.print(
        f"{_samples(plan.samples, plan.x_shape)}, not written: {plan.mb:,.0f} MB in "
        f"{plan.objects:,} objects of {plan.object_mb:.1f} MB, each of "
        f"{plan.inner_chunks_per_object} chunks\n"
        f"  {plan.write_requests:,} requests to write, {plan.read_requests:,} to read, "
        f"{plan.minibatch_requests:,.0f} ({plan.minibatch_mb:,.0f} MB) for 256 random samples; a "
        f"writer holds {plan.writer_mb:,.0f} MB\n"
        f"peak memory: {result.peak_mb[0]:,.0f} MB for 5,000 samples, {result.peak_mb[1]:,.0f} MB "
        f"for 50,000: {result.growth:.2f} times",
        highlight=False,
    )
    table = new_table(
        "Training, batches of 64: waiting for data",
        *("samples", "MB", "step ms, memory", "step ms, file", "waiting, memory"),
        "waiting, file",
    )
    for feed in result.feeding:
        table.add_row(
            _samples(feed.samples, feed.x_shape),
            f"{feed.mb:,.1f}",
            f"{feed.memory_step_ms:,.1f}",
            f"{feed.file_step_ms:,.1f}",
            f"{feed.memory_waiting:.2%}",
            f"{feed.file_waiting:.2%}",
        )
    console.print(table)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _samples(samples: int, shape: tuple[int, ...]) -> str:
    return f"{samples:,} of {' x '.join(map(str, shape))}"
