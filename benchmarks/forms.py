"""One model in every form that it can be loaded from, published by a process of its own, and the ways to load it.

Objects in Ray die with who put them, so the publisher stays until nobody needs them. Those who load are forked from a
process that has the imports done and has never been in Ray. Not for the clock (`load`, `article`).
"""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import dask
import numpy as np
import ray
import ray_zerocopy
import safetensors.torch
import torch
import transformers
from torch import nn

import zcinfer as zc
from zcinfer import loading, parts, stores

from .models import SUBJECTS
from .zerocopy2021 import extract, replace, replace_directly

Array = np.ndarray[Any, np.dtype[Any]]

RAY, FILE = "zcinfer, Ray store", "zcinfer, file store"
RAY_VARIANT, FILE_VARIANT = "zcinfer, Ray store, variant of a base", "zcinfer, file store, variant of a base"
METHOD, METHOD_DIRECT = "method of 2021", "method of 2021, set directly"
PRETRAINED, TORCH_LOAD, RAY_GET = "from_pretrained", "torch.load", "ray.get(model)"
TORCH_MMAP, META = "torch.load(mmap=True)", "meta + safetensors"
WITHOUT_RAY = (FILE, FILE_VARIANT, PRETRAINED, TORCH_LOAD, TORCH_MMAP, META)

# Publishes into the directory, and tells what readers need of it.
Publisher = Callable[[str, Path], dict[str, Any]]


@contextmanager
def published(how: Publisher, name: str) -> Iterator[dict[str, Any]]:
    """Run a publisher in a process of its own; yields what readers need."""
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


def serve(how: Publisher, name: str, directory: str, connection: Any) -> None:
    """Publish, tell what readers need, and stay until nobody needs it: objects in Ray die with who put them."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    settings = {"zcinfer.registry": f"{directory}/registry", "zcinfer.ray.object-store-memory": "5 GB"}
    with dask.config.set(settings):
        zc.connect("ray")
        try:
            with suppress(BrokenPipeError):  # nobody needs it any more
                connection.send(how(name, Path(directory)))
                connection.poll(None)  # until the other end is closed
        finally:
            zc.disconnect()


def publish(name: str, directory: Path, rounds: int) -> dict[str, Any]:
    """One model in every form; saved and put several times, for the clock."""
    subject = SUBJECTS[name]
    model: Any = subject.build()
    seconds: dict[str, list[float]] = {"torch.save": [], "zc.put": []}
    for number in range(rounds):
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
        "output": output_of(model, name),
        "variant_output": output_of(variant, name),
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
        ours = only in (RAY, RAY_VARIANT)
        if only is not None and not ours:
            parts.warm_up = int  # type: ignore[assignment]  # ray.init() of others does nothing of the kind
        stores.open_store(ref.store)
        objects = {} if ours else ray.cloudpickle.loads(forms["objects"])
    if only in (None, FILE, FILE_VARIANT):
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
        TORCH_LOAD: lambda: torch.load(directory / "model.pt", weights_only=False),
        "Ray's zero-copy tensors": lambda: ray.get(objects["tensors"]),
        RAY_GET: lambda: ray.get(objects["model"]),
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


def output_of(model: nn.Module, name: str) -> Array:
    """The model's first output."""
    with torch.no_grad():
        output = model(**SUBJECTS[name].inputs())
    array: Array = (output if isinstance(output, torch.Tensor) else output[0]).numpy()
    return array


def check(model: nn.Module, forms: Mapping[str, Any], way: str) -> None:
    """End the benchmark where a loaded model computes something else.

    Ours to the last bit. Others may have a tensor where it is not aligned, for which processors have other kernels.
    """
    expected: Array = forms["variant_output" if way in (RAY_VARIANT, FILE_VARIANT) else "output"]
    found = output_of(model, forms["name"])
    if way in (RAY, FILE, RAY_VARIANT, FILE_VARIANT):
        same = np.array_equal(found, expected)
    else:
        same = np.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))
    if not same:
        raise SystemExit(f"{forms['name']} loaded by {way} computes something else")


def code_of(name: str) -> None:
    """Import the model's code, so that no way to load it pays for that."""
    with torch.device("meta"):
        empty(name)


def quiet() -> None:
    """No warnings, and no bars of others."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # of arrays that are not writable, by those that have no copy-on-write
