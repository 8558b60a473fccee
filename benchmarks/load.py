"""How long does a model take to load, and what memory does each further reader need? Beside all other ways.

One process publishes each model in every form; the processes that load it are forked from one that has the imports done
and has never been in Ray. *Cold* is the first load of such a process, *warm* a new module again in one process, all
ways in turn. Every loaded model's output is compared with the original's, bit by bit.

    python -m benchmarks.load [--quick] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import dask
import ray
import ray_zerocopy
import safetensors.torch
import torch
import transformers
from torch import nn

import zcinfer as zc
from benchmarks.measure import bars, forked, interleaved, machine, milliseconds, summary, table, write
from benchmarks.models import SUBJECTS, small_bert
from benchmarks.zerocopy2021 import extract, replace, replace_directly
from zcinfer import loading, parts, stores
from zcinfer.memory import process_memory

RAY, FILE = "zcinfer, Ray store", "zcinfer, file store"
RAY_VARIANT, FILE_VARIANT = "zcinfer, Ray store, variant of a base", "zcinfer, file store, variant of a base"
METHOD, METHOD_DIRECT = "method of 2021", "method of 2021, set directly"
PRETRAINED = "from_pretrained"
TORCH, TORCH_MMAP, META = "torch.load", "torch.load(mmap=True)", "meta + safetensors"
WITHOUT_RAY = (FILE, FILE_VARIANT, PRETRAINED, TORCH, TORCH_MMAP, META)
VARIANTS = 50
# The bars, for the model that they are for.
MODEL, WARM, COLD, PRETRAINED_BOTH, RESIDENT_US, PRIVATE, PUT = "BERT-base", 2.5, 1.8, 40, 20, 2e6, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, to see that it works")
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in arguments.models:
        code_of(name)
    code_of("BERT-base")  # for the variants
    warm_rounds, cold_rounds = (5, 3) if arguments.quick else (30, 10)
    results: dict[str, Any] = machine() | {"models": {}}
    for name in arguments.models:
        say(f"{name}: publishing")
        with published("publish", name) as forms:
            results["models"][name] = measure(name, forms, warm_rounds, cold_rounds)
    say(f"{VARIANTS} variants of one small BERT")
    with published("publish_variants", "variants") as forms:
        results["variants"] = forked(lambda: visit(forms))
    results["bars"] = compare(results)
    text = report(results)
    write(arguments.out, "load", results, text, figures(results))
    print(text)
    say(f"written to {arguments.out}/load.json, .md and .html")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The publisher: a process of its own, with a Ray of its own and all forms of one model.


@contextmanager
def published(how: str, name: str) -> Iterator[dict[str, Any]]:
    """Run a publisher (a function of this module) in a process of its own; yields what readers need."""
    directory = tempfile.mkdtemp(prefix="zcinfer-bench-")
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(how, name, directory, theirs))
    process.start()
    theirs.close()
    try:
        forms = ours.recv()
        with dask.config.set({"zcinfer.registry": f"{directory}/registry"}):
            yield forms
    except EOFError:
        raise SystemExit("the publisher failed; its message is above") from None
    finally:
        ours.close()
        process.join()
        shutil.rmtree(directory)


def serve(how: str, name: str, directory: str, connection: Any) -> None:
    """Publish, tell what readers need, and stay until nobody needs it: objects in Ray die with who put them."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    settings = {"zcinfer.registry": f"{directory}/registry", "zcinfer.ray.object-store-memory": "5 GB"}
    with dask.config.set(settings):
        zc.connect("ray")
        try:
            connection.send(globals()[how](name, Path(directory)))
            connection.poll(None)  # until the other end is closed
        finally:
            zc.disconnect()


def publish(name: str, directory: Path) -> dict[str, Any]:
    """One model in every form."""
    subject = SUBJECTS[name]
    model: Any = subject.build()
    seconds: dict[str, list[float]] = {"torch.save": [], "zc.put": []}
    for number in range(5):
        begin = perf_counter()
        torch.save(model, directory / "model.pt")
        seconds["torch.save"].append(perf_counter() - begin)
        if number:
            zc.delete("model")
        begin = perf_counter()
        ref = zc.put(model, "model")
        seconds["zc.put"].append(perf_counter() - begin)
    variant = copy.deepcopy(model)
    with torch.no_grad():
        list(variant.parameters())[-1].add_(1)
    variant_ref = zc.put(variant, "variant", base=ref)
    safetensors.torch.save_model(model, str(directory / "model.safetensors"))
    if subject.pretrained:
        model.save_pretrained(directory / "pretrained")
    actor = putter()
    forms = {
        "model": ray.put(model),
        "arrays": ray.put(extract(model)),
        "tensors": ray.get(actor.put.remote(str(directory / "model.pt")))[0],
        "ray-zerocopy": ray_zerocopy.ModelWrapper.from_model(model, mode="actor"),
        "keep": actor,
    }
    return {
        "name": name,
        "directory": str(directory),
        "ref": ref,
        "variant_ref": variant_ref,
        "objects": ray.cloudpickle.dumps(forms),
        "output": output_digest(model, name),
        "variant_output": output_digest(variant, name),
        "put_seconds": seconds,
        "modules": sum(1 for _ in model.modules()),
        "tensors": len(model.state_dict()),
        "nbytes": ref.nbytes,
    }


def putter() -> Any:
    """An actor that puts a model with Ray's own zero-copy tensors, which a process has or has not from its start."""

    class Putter:  # in a function, to travel by value: Ray's workers do not know this file
        def put(self, path: str) -> list[Any]:
            warnings.simplefilter("ignore")
            self.kept = ray.put(torch.load(path, weights_only=False))
            return [self.kept]

    environment = {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return ray.remote(Putter).options(num_cpus=0, runtime_env={"env_vars": environment}).remote()


def publish_variants(_: str, directory: Path) -> dict[str, Any]:
    """Many variants of one small model."""
    refs = []
    for number in range(VARIANTS):
        model: Any = small_bert(number)
        model.save_pretrained(directory / str(number))
        refs.append(zc.put(model, f"variant-{number}"))
    return {"directory": str(directory), "refs": refs}


# The readers: processes forked for each measurement.


def readers(forms: Mapping[str, Any], only: str | None = None) -> dict[str, Callable[[], nn.Module]]:
    """Each way to load the model, in a process that is connected to Ray and has asked for nothing yet.

    For ``only`` one of them, the process is as its users have it: in Ray where that way needs Ray, and not otherwise.
    """
    name, directory = forms["name"], Path(forms["directory"])
    subject, ref = SUBJECTS[name], forms["ref"]
    variant = forms["variant_ref"]
    file_ref, file_variant = (dataclasses.replace(r, store=f"file:{directory}/registry") for r in (ref, variant))
    objects: dict[str, Any] = {}
    if only not in WITHOUT_RAY:
        if only not in (None, RAY, RAY_VARIANT):
            parts.warm_up = int  # type: ignore[assignment]  # ray.init() of others does nothing of the kind
        stores.open_store(ref.store)
        objects = ray.cloudpickle.loads(forms["objects"])
    stores.open_store(file_ref.store)

    def meta_and_safetensors() -> nn.Module:
        with torch.device("meta"):
            model = empty(name)
        tensors = safetensors.torch.load_file(str(directory / "model.safetensors"))
        model.load_state_dict(tensors, strict=False, assign=True)
        real_buffers(model)
        return model.eval()

    found: dict[str, Callable[[], nn.Module]] = {
        RAY: lambda: loading.load_ref(ref),
        FILE: lambda: loading.load_ref(file_ref),
        RAY_VARIANT: lambda: loading.load_ref(variant),
        FILE_VARIANT: lambda: loading.load_ref(file_variant),
        METHOD: lambda: replace(*ray.get(objects["arrays"])),
        METHOD_DIRECT: lambda: replace_directly(*ray.get(objects["arrays"])),
        "ray-zerocopy": lambda: objects["ray-zerocopy"].load(),
        TORCH_MMAP: lambda: torch.load(directory / "model.pt", weights_only=False, mmap=True),
        META: meta_and_safetensors,
        PRETRAINED: lambda: getattr(transformers, subject.pretrained).from_pretrained(directory / "pretrained").eval(),
        TORCH: lambda: torch.load(directory / "model.pt", weights_only=False),
        "Ray's zero-copy tensors": lambda: ray.get(objects["tensors"]),
        "ray.get(model)": lambda: ray.get(objects["model"]),
    }
    if not subject.pretrained:
        del found[PRETRAINED]
    return found


def empty(name: str) -> nn.Module:
    """The model of that name, under a meta device."""
    return SUBJECTS[name].build()


def real_buffers(model: nn.Module) -> None:
    """Buffers that no file has were made on the meta device: make them where the others are."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                # What transformers computes anew: positions, token types.
                fresh = torch.arange(buffer.shape[-1]).expand(buffer.shape) if name == "position_ids" else None
                module.register_buffer(name, torch.zeros_like(buffer, device="cpu") if fresh is None else fresh)


def output_digest(model: nn.Module, name: str) -> str:
    """SHA-256 of the model's first output."""
    with torch.no_grad():
        output = model(**SUBJECTS[name].inputs())
    tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def check(model: nn.Module, forms: Mapping[str, Any], way: str) -> None:
    """End the benchmark where a loaded model computes something else."""
    expected = forms["variant_output" if way in (RAY_VARIANT, FILE_VARIANT) else "output"]
    if output_digest(model, forms["name"]) != expected:
        raise SystemExit(f"{forms['name']} loaded by {way} computes something else")


def measure(name: str, forms: Mapping[str, Any], warm_rounds: int, cold_rounds: int) -> dict[str, Any]:
    """All measurements of one model, each in a process of its own."""
    quiet()
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
        "cold_and_forward": {way: summary([found["load"] + found["forward"] for found in cold[way]]) for way in ways},
        "warm": {way: summary(seconds) for way, seconds in warm["load"].items()},
        "resident": {key: summary(seconds) for key, seconds in warm["resident"].items()},
        "memory": memory,
    }


def code_of(name: str) -> None:
    """Import the model's code, so that no way to load it pays for that."""
    with torch.device("meta"):
        empty(name)


def quiet() -> None:
    warnings.simplefilter("ignore")  # of arrays that are not writable, by those that have no copy-on-write


def first_load(forms: Mapping[str, Any], way: str) -> dict[str, float]:
    load = readers(forms, way)[way]
    begin = perf_counter()
    model = load()
    loaded = perf_counter()
    check(model, forms, way)
    return {"load": loaded - begin, "forward": perf_counter() - loaded}


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
        "visits": len(order),
        "ways": {
            "zcinfer, at each visit": visits(ours),
            "zcinfer, all kept": visits(all_ours),
            "from_pretrained, at each visit": visits(theirs),
            "from_pretrained, all kept": visits(kept_theirs),
        },
    }


# The report.


def compare(results: Mapping[str, Any]) -> dict[str, Any]:
    """Each bar: what was asked, what was found."""
    found = results["models"].get(MODEL)
    if found is None:
        return {}
    asked: dict[str, tuple[float, float, bool]] = {}

    def ratio(kind: str, theirs: str, store: str) -> float:
        return float(found[kind][theirs]["median"] / found[kind][store]["median"])

    for store in (RAY, FILE, RAY_VARIANT, FILE_VARIANT):
        for method in (METHOD, METHOD_DIRECT):
            for kind, least in (("warm", WARM), ("cold", COLD)):
                value = ratio(kind, method, store)
                asked[f"{store}, {kind}: times faster than the {method}"] = (least, value, value >= least)
        for kind in ("warm", "cold"):
            value = ratio(kind, PRETRAINED, store)
            asked[f"{store}, {kind}: times faster than from_pretrained"] = (
                PRETRAINED_BOTH,
                value,
                value >= PRETRAINED_BOTH,
            )
        private = found["memory"][store]["private"] / 1e6
        asked[f"{store}: private MB of a further reader"] = (PRIVATE / 1e6, private, private <= PRIVATE / 1e6)
    back = found["resident"]["going back"]["median"] * 1e6
    asked["back to a resident, microseconds"] = (RESIDENT_US, back, back <= RESIDENT_US)
    put = found["put"]["zc.put"]["median"] / found["put"]["torch.save"]["median"]
    asked["zc.put, times as long as torch.save"] = (PUT, put, put <= PUT)
    return {name: {"asked": a, "found": f, "met": met} for name, (a, f, met) in asked.items()}


def report(results: Mapping[str, Any]) -> str:
    """All tables, in Markdown."""
    lines = [
        "# Loading a model",
        "",
        f"{results['when']}, {results['machine']}, Python {results['python']}, "
        + ", ".join(f"{name} {version}" for name, version in results["packages"].items())
        + ". Milliseconds: median (quartiles). One thread.",
    ]
    for name, found in results["models"].items():
        lines += ["", f"## {name}", ""]
        lines += [
            f"{found['nbytes'] / 1e6:,.0f} MB, {found['tensors']:,} tensors, {found['modules']:,} modules. "
            f"Back to a loaded one: {found['resident']['going back']['median'] * 1e6:.1f} µs, "
            f"{found['resident']['and giving it back, looked at']['median'] * 1e3:.2f} ms with the look at it when it "
            f"is given back. zc.put {milliseconds(found['put']['zc.put'])}, "
            f"torch.save {milliseconds(found['put']['torch.save'])}.",
            "",
        ]
        rows = [["way", "warm", "cold", "cold + first forward", "private MB", "shared MB"]]
        for way, warm in found["warm"].items():
            memory = found["memory"][way]
            rows.append(
                [
                    way,
                    milliseconds(warm),
                    milliseconds(found["cold"][way]),
                    milliseconds(found["cold_and_forward"][way]),
                    f"{memory['private'] / 1e6:.1f}",
                    f"{memory['shared'] / 1e6:.1f}",
                ]
            )
        lines.append(table(rows))
    variants = results["variants"]
    lines += ["", f"## {VARIANTS} variants of a BERT of {variants['nbytes'] / 1e6:.0f} MB", ""]
    lines += [f"{variants['visits']} visits in random order, a forward at each.", ""]
    rows = [["way", "loads/s", "median ms", "private MB more, at the end"]]
    for way, found in variants["ways"].items():
        rows.append(
            [
                way,
                f"{found['loads_per_second']:,.0f}",
                f"{found['median_seconds'] * 1e3:.2f}",
                f"{found['private'] / 1e6:.1f}",
            ]
        )
    lines.append(table(rows))
    if results["bars"]:
        lines += ["", "## What was asked", ""]
        rows = [["bar", "asked", "found", ""]]
        rows += [
            [name, f"{bar['asked']:g}", f"{bar['found']:.3g}", "met" if bar["met"] else "NOT MET"]
            for name, bar in results["bars"].items()
        ]
        lines.append(table(rows))
    return "\n".join(lines) + "\n"


def figures(results: Mapping[str, Any]) -> list[Any]:
    """A plot of each model's warm and cold loads."""
    found = []
    for name, measured in results["models"].items():
        for kind in ("warm", "cold"):
            scaled = {
                way: {key: value * 1e3 for key, value in numbers.items()} for way, numbers in measured[kind].items()
            }
            found.append(bars(f"{name}, {kind}: milliseconds to load", "ms", scaled))
    return found


if __name__ == "__main__":
    main()
