"""How long does a model take to load, and what memory does each further reader need? Beside all other ways.

One process publishes each model in every form; the processes that load it are forked from one that has the imports done
and has never been in Ray. *Cold* is the first load of such a process, after it has connected to Ray or opened the file
store (a column of its own: entering Ray takes a hundred times as long as a load); *warm* a new module again in one
process, all ways in turn. Every loaded model's output is compared with the original's, ours bit by bit. One thread.

All files are in the page cache, which shares memory-mapped files between processes as well as Ray does on one machine.
Pages are touched by the first forward: see "cold + first forward", and not the load alone, where a model is used once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import nn

import zcinfer as zc
from zcinfer import loading, stores
from zcinfer.memory import process_memory

from .benchmark import Benchmark, Options, bar, say
from .figures import bars
from .forms import (
    FILE,
    FILE_VARIANT,
    METHOD,
    METHOD_DIRECT,
    PRETRAINED,
    RAY,
    RAY_VARIANT,
    check,
    code_of,
    publish,
    published,
    quiet,
    readers,
)  # fmt: skip
from .measure import forked, interleaved, summary
from .models import SUBJECTS, small_bert
from .tables import Table

# Of the small model; models of a quick run
VARIANTS, QUICK_VARIANTS = 50, 10
QUICK = ("BERT-base",)
# Rounds of warm loads, of cold ones, of publishing
ROUNDS, QUICK_ROUNDS = (30, 10, 5), (5, 3, 2)
# The bars, for the model that they are for.
MODEL, WARM, COLD, PRETRAINED_BOTH, RESIDENT_US, PRIVATE, PUT = "BERT-base", 2.5, 1.8, 40, 20, 2e6, 3


def measure(options: Options) -> dict[str, Any]:
    """Publish each model in turn and load it in all ways; then many variants."""
    torch.set_num_threads(1)
    quiet()
    names = [name for name in SUBJECTS if options.wants(name) and (name in QUICK or not options.quick)]
    for name in {*names, "BERT-base"}:  # BERT for the variants
        code_of(name)
    warm_rounds, cold_rounds, put_rounds = QUICK_ROUNDS if options.quick else ROUNDS
    variants = QUICK_VARIANTS if options.quick else VARIANTS
    results: dict[str, Any] = {"models": {}}
    for name in names:
        say(f"{name}: publishing")
        with published(partial(publish, rounds=put_rounds), name) as forms:
            results["models"][name] = measure_one(name, forms, warm_rounds, cold_rounds)
    say(f"{variants} variants of one small BERT")
    with published(partial(publish_variants, many=variants), "variants") as forms:
        results["variants"] = forked(lambda: visit(forms))
    results["bars"] = compare(results)
    return results


def measure_one(name: str, forms: Mapping[str, Any], warm_rounds: int, cold_rounds: int) -> dict[str, Any]:
    """All measurements of one model, each in a process of its own."""
    ways = list(forked(lambda: list(readers(forms))))
    say(f"{name}: cold, {cold_rounds} processes for each of {len(ways)} ways")
    cold: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(cold_rounds):
        for way in ways:
            cold[way].append(forked(lambda way=way: first_load(forms, way)))  # type: ignore[misc]
    say(f"{name}: memory")
    memory = {way: forked(lambda way=way: touched(forms, way)) for way in ways}  # type: ignore[misc]
    say(f"{name}: warm, {warm_rounds} rounds")
    warm = forked(lambda: again(forms, warm_rounds))
    return {
        **{key: forms[key] for key in ("modules", "tensors", "nbytes")},
        "put": {way: summary(seconds) for way, seconds in forms["put_seconds"].items()},
        "cold": {way: summary([found["load"] for found in cold[way]]) for way in ways},
        "connect": {way: summary([found["connect"] for found in cold[way]]) for way in ways},
        "cold_and_forward": {way: summary([found["load"] + found["forward"] for found in cold[way]]) for way in ways},
        "warm": {way: summary(seconds) for way, seconds in warm["load"].items()},
        "resident": {key: summary(seconds) for key, seconds in warm["resident"].items()},
        "memory": memory,
    }


def first_load(forms: Mapping[str, Any], way: str) -> dict[str, float]:
    begin = perf_counter()
    load = readers(forms, way)[way]
    connected = perf_counter()
    model = load()
    loaded = perf_counter()
    check(model, forms, way)
    return {"connect": connected - begin, "load": loaded - connected, "forward": perf_counter() - loaded}


def touched(forms: Mapping[str, Any], way: str) -> dict[str, int]:
    """Private and shared bytes that a load costs, with every byte of the weights read."""
    load = readers(forms, way)[way]
    before = process_memory()
    model = load()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().view(-1).view(torch.uint8).max()
    after = process_memory()
    return {"private": after.private - before.private, "shared": after.shared - before.shared}


def again(forms: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    ways = readers(forms)
    for way, load in ways.items():
        check(load(), forms, way)
    ref = forms["ref"]
    resident: dict[str, list[float]] = {"going back": [], "and giving it back, looked at": []}
    for _ in range(200):
        begin = perf_counter()
        with loading.residents.lend(ref, "cpu", "refuse"):
            entered = perf_counter()
        resident["going back"].append(entered - begin)
        resident["and giving it back, looked at"].append(perf_counter() - begin)
    loading.residents.clear()
    return {"load": interleaved(ways, rounds), "resident": {key: times[1:] for key, times in resident.items()}}


def publish_variants(_: str, directory: Path, many: int) -> dict[str, Any]:
    """Many variants of one small model."""
    refs = []
    for number in range(many):
        model: Any = small_bert(number)
        model.save_pretrained(directory / str(number))
        refs.append(zc.put(model, f"variant-{number}"))
    return {"directory": str(directory), "refs": refs}


def visit(forms: Mapping[str, Any]) -> dict[str, Any]:
    """Many models in random order: loaded at each visit, by us and by from_pretrained, and all kept."""
    directory, refs = Path(forms["directory"]), forms["refs"]
    stores.open_store(refs[0].store)
    order = random.Random(0).choices(range(len(refs)), k=4 * len(refs))
    tokens = torch.arange(1, 15)[None]

    def visits(load: Callable[[int], nn.Module]) -> dict[str, float]:
        load(0)
        before, seconds = process_memory(), []
        for number in order:
            begin = perf_counter()
            model = load(number)
            seconds.append(perf_counter() - begin)
            with torch.no_grad():
                model(tokens)
        after = process_memory()
        return {
            "loads_per_second": len(seconds) / sum(seconds),
            "median_seconds": median(seconds),
            "private": after.private - before.private,
        }

    def ours(number: int) -> nn.Module:
        return loading.load_ref(refs[number])

    def theirs(number: int) -> nn.Module:
        model: nn.Module = transformers.BertModel.from_pretrained(directory / str(number))
        return model.eval()

    kept: dict[int, nn.Module] = {}

    def kept_theirs(number: int) -> nn.Module:
        return kept.setdefault(number, kept.get(number) or theirs(number))

    kept_ours: dict[int, nn.Module] = {}

    def all_ours(number: int) -> nn.Module:
        return kept_ours.setdefault(number, kept_ours.get(number) or ours(number))

    with torch.no_grad():
        for number in (0, len(refs) - 1):
            if not torch.equal(ours(number)(tokens)[0], theirs(number)(tokens)[0]):
                raise SystemExit(f"variant {number} computes something else")
    return {
        "nbytes": refs[0].nbytes,
        "variants": len(refs),
        "visits": len(order),
        "ways": {
            "zcinfer, at each visit": visits(ours),
            "zcinfer, all kept": visits(all_ours),
            "from_pretrained, at each visit": visits(theirs),
            "from_pretrained, all kept": visits(kept_theirs),
        },
    }


def compare(results: Mapping[str, Any]) -> dict[str, Any]:
    """Each bar: what was asked, what was found."""
    found = results["models"].get(MODEL)
    if found is None:
        return {}
    asked = {}
    for store in (RAY, FILE, RAY_VARIANT, FILE_VARIANT):
        for theirs, least in (
            (METHOD, (WARM, COLD)),
            (METHOD_DIRECT, (WARM, COLD)),
            (PRETRAINED, (PRETRAINED_BOTH,) * 2),
        ):
            for kind, one in zip(("warm", "cold"), least, strict=True):
                ratio = found[kind][theirs]["median"] / found[kind][store]["median"]
                asked[f"{store}, {kind}: times faster than {theirs}"] = bar(one, ratio)
        private = found["memory"][store]["private"] / 1e6
        asked[f"{store}: private MB of a further reader"] = bar(PRIVATE / 1e6, private, most=True, unit="MB")
    back = found["resident"]["going back"]["median"] * 1e6
    asked["back to a resident, microseconds"] = bar(RESIDENT_US, back, most=True, unit="µs")
    put = found["put"]["zc.put"]["median"] / found["put"]["torch.save"]["median"]
    asked["zc.put, times as long as torch.save"] = bar(PUT, put, most=True)
    return asked


def tables(results: Mapping[str, Any]) -> list[Table]:
    """A table for each model, one of what is done once, one of the variants."""
    columns = {"way": "", "warm, times as long": "x", "cold, times as long": "x", "warm": "ms", "cold": "ms",
               "cold + first forward": "ms", "connecting, before": "ms", "private": "MB", "shared": "MB"}  # fmt: skip
    shown, once = [], []
    for name, found in results["models"].items():
        ours = {kind: found[kind][RAY]["median"] for kind in ("warm", "cold")}
        rows = [
            [way, warm["median"] / ours["warm"], found["cold"][way]["median"] / ours["cold"], warm, found["cold"][way],
             found["cold_and_forward"][way], found["connect"][way]["median"],
             found["memory"][way]["private"], found["memory"][way]["shared"]]
            for way, warm in found["warm"].items()
        ]  # fmt: skip
        size = f"{found['nbytes'] / 1e6:,.0f} MB, {found['tensors']:,} tensors, {found['modules']:,} modules"
        shown.append(Table(f"Loads of {name} ({size})", columns, rows, f"Times as long as {RAY}."))
        back = found["resident"]
        once.append([name, found["put"]["zc.put"]["median"] / found["put"]["torch.save"]["median"],
                     found["put"]["zc.put"], found["put"]["torch.save"], back["going back"]["median"],
                     back["and giving it back, looked at"]["median"]])  # fmt: skip
    columns = {"model": "", "put, times as long": "x", "zc.put": "ms", "torch.save": "ms", "back to a loaded one": "µs",
               "and given back, looked at": "µs"}  # fmt: skip
    shown.append(Table("Publishing, and going back", columns, once))
    variants = results["variants"]
    rows = [
        [way, found["loads_per_second"], found["median_seconds"], found["private"]]
        for way, found in variants["ways"].items()
    ]
    columns = {"way": "", "loads": "loads/s", "median": "ms", "private memory more, at the end": "MB"}
    title = f"{variants['variants']} variants of a BERT of {variants['nbytes'] / 1e6:.0f} MB"
    return [*shown, Table(title, columns, rows, f"{variants['visits']} visits in random order, a forward at each.")]


def figures(results: Mapping[str, Any]) -> list[Any]:
    """A plot of each model's warm and cold loads."""
    return [
        bars(f"{name}, {kind}: milliseconds to load", "ms", measured[kind])
        for name, measured in results["models"].items()
        for kind in ("warm", "cold")
    ]


BENCHMARK = Benchmark("load", "Loading a model", __doc__, measure, tables, figures)
