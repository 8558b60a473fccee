"""The figures of "How to Load Deep Learning Models 300 Times Faster with Ray" (Reiss, 2021), measured today, and ours.

*Loads*: its five, beside ours, in one process and in turn; mean, 5th and 95th percentile over 100 loads, as there; and
a load with one forward, since a load alone does not touch its pages. Models have random weights, all files are in the
page cache, and there is one thread. *Calls*: one sentence through BERT-base, as a Ray task that loads zero-copy in
every call, as a Ray actor that keeps the model, and the same two with Dask and zcinfer: from the client and back.
*Caveats*: what the article warns of, or does not, each in processes of its own. Its published numbers are those of
another machine and of the libraries of 2021: compare ratios. Every model's output is compared with the original's, bit
by bit, before its time counts.

Not shown: many readers at a time (see `load` for their memory, `models` for requests), and reading from a disk.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import dask
import numpy as np
import ray
import torch
from torch import nn

import zcinfer as zc
from zcinfer import loading, stores

from .benchmark import Benchmark, Options, bar, say
from .figures import bars
from .forms import (
    FILE,
    METHOD,
    METHOD_DIRECT,
    PRETRAINED,
    RAY,
    RAY_GET,
    TORCH_LOAD,
    check,
    code_of,
    publish,
    published,
    quiet,
    readers,
)  # fmt: skip
from .measure import forked, interleaved, summary
from .models import SUBJECTS
from .tables import Table
from .zerocopy2021 import replace

MODELS = ("BERT-base", "ResNet-50")
WAYS = (PRETRAINED, TORCH_LOAD, RAY_GET, METHOD, METHOD_DIRECT, RAY, FILE)
# Seconds, of BERT-base, as published; measured on another machine.
PUBLISHED = {PRETRAINED: 1.39, TORCH_LOAD: 0.106, RAY_GET: 0.180, METHOD: 0.00421, METHOD_DIRECT: 0.00392}
TASK, ACTOR = "Ray task, method of 2021 in every call", "Ray actor that keeps the model"
OUR_TASK, OUR_RESIDENT = "zcinfer in a Dask task, loaded in every call", "zcinfer in a Dask task, kept"
PUBLISHED_CALLS = {TASK: 0.072, ACTOR: 0.064}
# Threads of every process here, as of the workers of a cluster of as many as there are cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def measure(options: Options) -> dict[str, Any]:
    """Loads of each model; calls and caveats of BERT-base."""
    os.environ.update(ONE_THREAD)
    torch.set_num_threads(1)
    quiet()
    rounds, calls = (5, 5) if options.quick else (100, 100)
    names = [name for name in (MODELS[:1] if options.quick and not options.only else MODELS) if options.wants(name)]
    for name in names:
        code_of(name)
    results: dict[str, Any] = {"loads": {}, "absent": {}}
    if not torch.cuda.is_available():
        results["absent"]["all of these loads to CUDA"] = "torch finds no CUDA device here"
    for name in names:
        say(f"{name}: publishing")
        with published(functools.partial(publish, rounds=1), name) as forms:
            say(f"{name}: {rounds} loads in each of {len(WAYS)} ways")
            found = forked(lambda forms=forms: loads(forms, rounds))  # type: ignore[misc]
            results["loads"][name] = found
            if name == MODELS[0]:
                say(f"{name}: {calls} calls of each kind")
                results["calls"] = forked(lambda forms=forms: remote_calls(forms, calls))  # type: ignore[misc]
                say(f"{name}: first forwards, and caveats")
                ways = (METHOD, RAY, FILE, PRETRAINED)
                firsts = [
                    {way: forked(lambda way=way, forms=forms: forwards(forms, way)) for way in ways}  # type: ignore[misc]
                    for _ in range(2 if options.quick else 10)
                ]
                results["forwards"] = {
                    way: {key: summary([one[way][key] for one in firsts]) for key in ("load", "first", "second")}
                    for way in ways
                }
                results["caveats"] = caveats(forms)  # the last: the store's own copy is another one afterwards
    results["bars"] = compare(results)
    return results


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Mean, 5th and 95th percentile, as the article has them; the spread is that of the quartiles, as elsewhere."""
    low, high = (float(value) for value in np.quantile(seconds, (0.05, 0.95)))
    return summary(seconds) | {"mean": float(np.mean(seconds)), "low": low, "high": high}


def loads(forms: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Each way to load the model in turn, to the CPU and, where there is one, to CUDA."""
    ways: dict[str, Callable[[], nn.Module]] = {way: found for way, found in readers(forms).items() if way in WAYS}
    for way, load in ways.items():
        check(load(), forms, way)
    timed = dict(ways)
    if torch.cuda.is_available():
        timed |= {f"{way}, to CUDA": functools.partial(to_cuda, load) for way, load in ways.items()}
    seconds = interleaved(timed, rounds)
    inputs = SUBJECTS[forms["name"]].inputs()
    used = interleaved({way: functools.partial(use, load, inputs) for way, load in ways.items()}, max(5, rounds // 4))
    return {
        "nbytes": forms["nbytes"],
        "ways": {way: percentiles(found) for way, found in seconds.items()},
        "used": {way: percentiles(found) for way, found in used.items()},
    }


def use(load: Callable[[], nn.Module], inputs: Mapping[str, Any]) -> None:
    """Load, and run once."""
    with torch.no_grad():
        load()(**inputs)


def to_cuda(load: Callable[[], nn.Module]) -> nn.Module:
    """Load, move to the GPU, and wait until it is there."""
    model = load().to("cuda")
    torch.cuda.synchronize()
    return model


def remote_calls(forms: Mapping[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """One sentence through the model elsewhere: in a Ray task, in an actor, and in tasks of Dask."""
    stores.open_store(forms["ref"].store)  # connects to Ray
    arrays = ray.cloudpickle.loads(forms["objects"])["arrays"]
    tokens = SUBJECTS[forms["name"]].inputs()["input_ids"].numpy()
    model: Any = SUBJECTS[forms["name"]].build()
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens))[0].numpy()
    method = replace

    def by_method(parts: Any, rows: Any) -> Any:  # in a function, to travel by value: Ray does not know this file
        with torch.inference_mode():
            return method(*parts)(torch.from_numpy(rows.copy()))[0].numpy()

    class Keeper:
        def __init__(self, parts: Any):
            self.model = method(*parts)

        def call(self, rows: Any) -> Any:
            with torch.inference_mode():
                return self.model(torch.from_numpy(rows.copy()))[0].numpy()

    environment = {"env_vars": {**ONE_THREAD, "PYTHONPATH": os.pathsep.join(_paths())}}
    task = ray.remote(by_method).options(num_cpus=0, runtime_env=environment)
    actor = ray.remote(Keeper).options(num_cpus=0, runtime_env=environment).remote(arrays)
    settings = {"zcinfer.store": "file", "distributed.admin.system-monitor.gil.enabled": False}
    with (
        dask.config.set(settings),
        zc.LocalCluster(n_workers=1, threads_per_worker=1, env=ONE_THREAD) as cluster,
        cluster.get_client() as client,
    ):
        predictor = zc.Predictor(forms["ref"], batch_size=1, output="last_hidden_state")
        assert np.array_equal(predictor(tokens), expected)  # and it knows its output's shape, here and there

        ways: dict[str, Callable[[], Any]] = {
            TASK: lambda: ray.get(task.remote(arrays, tokens)),
            ACTOR: lambda: ray.get(actor.call.remote(tokens)),
            OUR_TASK: lambda: client.submit(loaded_and_called, forms["ref"], tokens, pure=False).result(),
            OUR_RESIDENT: lambda: client.submit(predictor, tokens, pure=False).result(),
        }
        for way, call in ways.items():
            found = call()
            if not np.array_equal(found, expected):
                raise SystemExit(f"{way}: another answer")
        seconds = interleaved(ways, rounds)
        local: dict[str, Callable[[], object]] = {
            "the forward alone, in this process": functools.partial(forward, model, tokens),
            "the forward alone, after the method of 2021": functools.partial(
                forward, replace(*ray.get(arrays)), tokens
            ),
            "the forward alone, after zcinfer": functools.partial(forward, loading.load_ref(forms["ref"]), tokens),
        }
        seconds |= interleaved(local, rounds)
    return {way: percentiles(found) for way, found in seconds.items()}


def loaded_and_called(ref: Any, rows: Any) -> Any:
    """A task that loads the model anew."""
    return forward(loading.load_ref(ref), rows)


def forward(model: Any, rows: Any) -> Any:
    """The last hidden state."""
    with torch.inference_mode():
        return model(torch.from_numpy(rows))[0].numpy()


def forwards(forms: Mapping[str, Any], way: str) -> dict[str, float]:
    """Seconds of the load, of the first forward and of the second, in a process that has done nothing before."""
    load = readers(forms)[way]
    inputs = SUBJECTS[forms["name"]].inputs()
    times = [perf_counter()]
    model = load()
    times.append(perf_counter())
    with torch.no_grad():
        for _ in range(2):
            model(**inputs)
            times.append(perf_counter())
    check(model, forms, way)
    load_time, first, second = (float(value) for value in np.diff(times))
    return {"load": load_time, "first": first, "second": second}


def caveats(forms: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What happens to those who do not know: warnings, and writes to weights, which other readers see or do not."""
    ways = (METHOD, RAY, FILE)
    found = {way: {"warnings": forked(lambda way=way: warned(forms, way))} for way in ways}  # type: ignore[misc]
    before = forked(lambda: float(next(SUBJECTS[forms["name"]].build().parameters()).flatten()[0]))
    for way in (RAY, FILE, METHOD):
        how = forked(lambda way=way: written(forms, way))  # type: ignore[misc]
        after = forked(lambda way=way: first_weight(forms, way))  # type: ignore[misc]
        found[way]["a model that writes to its weights"] = how
        found[way]["what the next reader gets"] = "the weights" if after == before else "what was written"
    return found


def warned(forms: Mapping[str, Any], way: str) -> str:
    """The warnings that a load gives."""
    load = readers(forms)[way]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == METHOD:
            # It is silenced there, as the article advises.
            arrays = ray.get(ray.cloudpickle.loads(forms["objects"])["arrays"])[1]
            torch.as_tensor(next(array for tensors in arrays for array in tensors["params"].values()))
        else:
            load()
    return "; ".join(str(one.message).partition(",")[0] for one in caught) or "none"


def written(forms: Mapping[str, Any], way: str) -> str:
    """Write to the first weight, as a training step or a cache would."""
    model = readers(forms)[way]()
    try:
        with torch.inference_mode():
            next(model.parameters()).data.flatten()[:1].fill_(42)
    except RuntimeError as error:
        return f"is refused: {error}"
    return "writes"


def first_weight(forms: Mapping[str, Any], way: str) -> float:
    """The first weight, for another reader."""
    return float(next(readers(forms)[way]().parameters()).detach().flatten()[0])


def _paths() -> list[str]:
    return [str(Path(zc.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]


def compare(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader of the article will ask."""
    found = results["loads"].get(MODELS[0])
    if found is None:
        return {}
    mean = {way: one["mean"] for way, one in found["ways"].items()}
    calls = {way: one["mean"] for way, one in results["calls"].items()}
    return {
        "BERT-base: zcinfer, Ray store, times faster than the article's best": bar(
            1, min(mean[METHOD], mean[METHOD_DIRECT]) / mean[RAY]
        ),
        "calls: the Ray task, times as long as zcinfer's task that loads in every call": bar(
            1, calls[TASK] / calls[OUR_TASK]
        ),
    }


def order(seconds: Mapping[str, float]) -> str:
    """The article's ways, the slowest first."""
    ways = [way for way in PUBLISHED if way in seconds]
    return " > ".join(sorted(ways, key=lambda way: seconds[way], reverse=True))


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Loads, calls, first forwards, caveats."""
    shown = []
    for name, found in results["loads"].items():
        base = found["ways"][PRETRAINED]["mean"]
        seen = PUBLISHED if name == MODELS[0] else {}
        rows: list[list[Any]] = [
            [
                way,
                base / one["mean"],
                one,
                found["used"].get(way),
                seen[PRETRAINED] / seen[way] if way in seen else None,
                seen.get(way),
            ]
            for way, one in found["ways"].items()
        ]
        columns = {"way": "", "times faster than from_pretrained": "x", "mean (5th–95th percentile)": "ms",
                   "with a forward": "ms", "published, times faster": "x",
                   "published, another machine": "ms"}  # fmt: skip
        here = order({way: one["mean"] for way, one in found["ways"].items()})
        note = f"Order here: {here}."
        note += f" Order as published: {order(seen)}." if seen else " The article has no numbers for it."
        shown.append(Table(f"Loads of {name} ({found['nbytes'] / 1e6:,.0f} MB)", columns, rows, note))
    if "calls" in results:
        calls = results["calls"]
        rows = [[way, one["mean"] / calls[ACTOR]["mean"], one, PUBLISHED_CALLS.get(way)] for way, one in calls.items()]
        columns = {"call": "", "times as long as the actor": "x", "mean (5th–95th percentile)": "ms",
                   "published, another machine": "ms"}  # fmt: skip
        shown.append(Table("One sentence through BERT-base", columns, rows, "From the client, and back to it."))
        rows = [[way, *(one[key] for key in ("load", "first", "second"))] for way, one in results["forwards"].items()]
        columns = {"way": "", "load": "ms", "first forward": "ms", "second forward": "ms"}
        note = "In a fresh process. The first forward touches the pages of shared memory, a load does not."
        shown.append(Table("What a load does not show: the first forward", columns, rows, note))
        keys = list(next(iter(results["caveats"].values())))
        rows = [[way, *(one[key] for key in keys)] for way, one in results["caveats"].items()]
        shown.append(Table("Caveats", {"way": "", **dict.fromkeys(keys, "")}, rows))
    return shown


def figures(results: Mapping[str, Any]) -> list[Any]:
    """The article's figure, with ours in it; and the calls."""
    found = [
        bars(f"{name}: milliseconds to load, mean, 5th and 95th percentile", "ms", one["ways"],
             published=PUBLISHED if name == MODELS[0] else None)
        for name, one in results["loads"].items()
    ]  # fmt: skip
    if "calls" in results:
        title = "One sentence through BERT-base: milliseconds from the client and back"
        found.append(bars(title, "ms", results["calls"], published=PUBLISHED_CALLS))
    return found


BENCHMARK = Benchmark("article", "The article of 2021, today", __doc__, measure, tables, figures)
