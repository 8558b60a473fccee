"""The counters as Prometheus metrics, on the ``/metrics`` pages that Dask's workers and scheduler serve.

Needs the package ``prometheus_client``, as those pages do. Not for counting (`telemetry`), nor for jobs (`observer`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import sampling, telemetry
from .condition import UNAVAILABLE
from .telemetry import BOUNDS, KINDS, LOAD_PHASES, PHASES

if TYPE_CHECKING:
    from .observer import Observer

# Counter of `telemetry.Work`, its name here, and what it is.
_OF_WORK = {
    "rows": ("zcinfer_rows", "Rows predicted"),
    "blocks": ("zcinfer_blocks", "Blocks predicted"),
    "batches": ("zcinfer_batches", "Batches that a model got"),
    "bytes_in": ("zcinfer_input_bytes", "Bytes of the inputs of predicted blocks"),
    "bytes_out": ("zcinfer_output_bytes", "Bytes of the outputs of predicted blocks"),
    "errors": ("zcinfer_block_errors", "Blocks that failed"),
    "halved": ("zcinfer_batches_halved", "Batches that did not fit into memory"),
}

# Figure of `nvml.FIGURES`, its name here, what it is, and what it is to be multiplied by.
_OF_GPU = {
    "utilization": ("zcinfer_gpu_utilization_ratio", "Share of the time that a kernel ran", 0.01),
    "memory_busy": ("zcinfer_gpu_memory_busy_ratio", "Share of the time that the card's memory was in use", 0.01),
    "memory_used": ("zcinfer_gpu_memory_used_bytes", "Memory of the card that is taken", 1),
    "memory_total": ("zcinfer_gpu_memory_total_bytes", "Memory of the card", 1),
    "temperature": ("zcinfer_gpu_temperature_celsius", "Temperature of the card", 1),
    "power": ("zcinfer_gpu_power_watts", "What the card takes", 1),
    "power_limit": ("zcinfer_gpu_power_limit_watts", "What the card may take", 1),
    "clock": ("zcinfer_gpu_clock_hertz", "Clock of the multiprocessors", 1e6),
    "clock_memory": ("zcinfer_gpu_memory_clock_hertz", "Clock of the card's memory", 1e6),
    "own_memory": ("zcinfer_gpu_process_memory_bytes", "Memory of the card that this process has", 1),
    "own_utilization": ("zcinfer_gpu_process_utilization_ratio", "Share of the card that this process used", 0.01),
}

_workers: _OfWorker | None = None
_scheduler: _OfScheduler | None = None


def show_worker() -> None:
    """Have the counters of this process on its page; nothing where ``prometheus_client`` is not installed."""
    global _workers
    if _workers is None and (registry := _registry()) is not None:
        _workers = _OfWorker()
        registry.register(_workers)


def show_scheduler(observer: Observer) -> None:
    """Have what the observer knows of jobs on the scheduler's page."""
    global _scheduler
    if _scheduler is None and (registry := _registry()) is not None:
        _scheduler = _OfScheduler()
        registry.register(_scheduler)
    if _scheduler is not None:
        _scheduler.observer = weakref.ref(observer)  # the latest of this process


def _registry() -> Any:
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        return None
    return REGISTRY


def _counter(name: str, what: str, labels: Sequence[str]) -> Any:
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(name, what, labels=labels)


def _gauge(name: str, what: str, labels: Sequence[str] = ()) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(name, what, labels=labels)


def _histogram(name: str, what: str, labels: Sequence[str]) -> Any:
    from prometheus_client.core import HistogramMetricFamily

    return HistogramMetricFamily(name, what, labels=labels)


def _buckets(counts: Sequence[int]) -> list[tuple[str, int]]:
    """Prometheus counts what is up to each bound, and not what is between two of them."""
    sums, total = [], 0
    for bound, count in zip((*map(repr, BOUNDS), "+Inf"), counts, strict=True):
        total += count
        sums.append((bound, total))
    return sums


class _OfWorker:
    """What one process has counted."""

    def describe(self) -> list[Any]:
        return []  # asks for nothing when it is registered

    def collect(self) -> Iterator[Any]:
        found = telemetry.snapshot()
        yield from _of_work(found["work"])
        yield from _of_loads(found["loads"])
        for name, what in (
            ("private", "Memory that this process has for itself"),
            ("shared", "Memory that others share"),
        ):
            gauge = _gauge(f"zcinfer_process_{name}_bytes", what)
            gauge.add_metric([], found[name])
            yield gauge
        seen = sampling.latest()
        # Where there is a reason in the place of an answer, there is no figure
        yield from _of_gpus([] if isinstance(gpus := seen.get("gpus", []), str) else gpus)
        yield from _of_stores([] if isinstance(stores := seen.get("stores", []), str) else stores)


def _of_work(works: Sequence[dict[str, Any]]) -> Iterator[Any]:
    labels = ("job", "name", "model")
    for counter, (name, what) in _OF_WORK.items():
        family = _counter(name, what, labels)
        for work in works:
            family.add_metric([work[label] for label in labels], work[counter])
        yield family
    phases = _counter("zcinfer_phase_seconds", "Where the time of blocks went", (*labels, "phase"))
    blocks = _histogram("zcinfer_block_seconds", "Seconds of a block in all", labels)
    for work in works:
        values = [work[label] for label in labels]
        for phase, seconds in zip(PHASES, work["seconds"], strict=True):
            phases.add_metric([*values, phase], seconds)
        blocks.add_metric(values, _buckets(work["histogram"]), sum(work["seconds"]))
    yield phases
    yield blocks


def _of_loads(loaded: Sequence[dict[str, Any]]) -> Iterator[Any]:
    kinds = _counter("zcinfer_loads", "How models were had", ("model", "kind"))
    phases = _counter("zcinfer_load_phase_seconds", "Where the time of loads went", ("model", "phase"))
    times = _histogram("zcinfer_load_seconds", "Seconds of a load", ("model", "kind"))
    evicted = _counter("zcinfer_evicted", "Modules dropped", ("model",))
    sizes = {
        name: _gauge(f"zcinfer_model_{name}_bytes", what, ("model",))
        for name, what in (("shared", "Of a model, shared by all"), ("private", "Of a model, held by each process"))
    }
    for model in loaded:
        name = model["model"]
        for kind, count in zip(KINDS, model["counts"], strict=True):
            kinds.add_metric([name, kind], count)
        for phase, seconds in zip(LOAD_PHASES, model["seconds"], strict=True):
            phases.add_metric([name, phase], seconds)
        for kind, histogram in model["histograms"].items():
            times.add_metric([name, kind], _buckets(histogram), None)
        evicted.add_metric([name], model["evicted"])
        for size, gauge in sizes.items():
            gauge.add_metric([name], model[size])
    yield from (kinds, phases, times, evicted, *sizes.values())


def _of_gpus(cards: Sequence[dict[str, Any]]) -> Iterator[Any]:
    labels = ("card", "uuid", "name")
    for figure, (name, what, factor) in _OF_GPU.items():
        family = _gauge(name, what, labels)
        for card in cards:
            if not isinstance(card[figure], str):
                family.add_metric([card[label] for label in labels], card[figure] * factor)
        yield family
    throttled = _gauge("zcinfer_gpu_throttled", "1 for each reason why clocks are lowered", (*labels, "reason"))
    for card in cards:
        if not card["throttled"].startswith(UNAVAILABLE):
            for reason in filter(None, card["throttled"].split(", ")):
                throttled.add_metric([*(card[label] for label in labels), reason], 1)
    yield throttled


def _of_stores(stores: Sequence[dict[str, Any]]) -> Iterator[Any]:
    sizes = _gauge("zcinfer_store_bytes", "Bytes of a store of this machine, by what they are", ("store", "kind"))
    healthy = _gauge("zcinfer_store_healthy", "1 where models can be had from a store, else 0", ("store",))
    for store in stores:
        for kind, size in store["sizes"].items():
            if not isinstance(size, str):
                sizes.add_metric([store["store"], kind], size)
        healthy.add_metric([store["store"]], store["healthy"])
    yield from (sizes, healthy)


class _OfScheduler:
    """What the scheduler knows of jobs."""

    observer: weakref.ref[Observer] | None = None

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        observer = self.observer() if self.observer is not None else None
        labels = ("number", "job", "name")
        blocks = _gauge("zcinfer_job_blocks", "Blocks of a job, by state", (*labels, "state"))
        total = _gauge("zcinfer_job_blocks_all", "Blocks of a job, in all", labels)
        again = _gauge("zcinfer_job_blocks_retried", "Blocks of a job that went to a worker again", labels)
        spent = _counter("zcinfer_observer_seconds", "What following jobs took of the scheduler's time", ())
        if observer is not None:
            for job in observer.jobs.values():
                told = job.plain()
                values = [str(told["number"]), told["job"], told["name"]]
                total.add_metric(values, told["total"])
                again.add_metric(values, told["retried"])
                for state in ("queued", "running", "done", "failed", "cancelled"):
                    blocks.add_metric([*values, state], told[state])
            spent.add_metric([], observer.spent)
        yield from (blocks, total, again, spent)
