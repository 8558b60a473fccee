"""What reader processes do in `test_safety`, and the program that forks them.

To import torch and Ray takes seconds. One process does it once, and is forked for each reader: it has one thread and is
in no Ray. A reader tells facts as lines of JSON, so that those from before a fault are known.
"""

from __future__ import annotations

import atexit
import copy
import ctypes
import gc
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from processes import wait_until
from torch import nn

from zcinfer import loading, ray_store, stores
from zcinfer.loading import load_ref
from zcinfer.memory import process_memory
from zcinfer.sharing import Plasma
from zcinfer.store import ModelRef

IDS = torch.arange(16)


class Model(nn.Module):
    """Small tensors and buffers, which models do write to, and large weights, which only a mistake writes to."""

    cache: torch.Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(1000, 64)
        self.norm = nn.BatchNorm1d(64)
        self.linear = nn.Linear(64, 2048)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("cache", torch.zeros(4, 2048))
        self.keys, self.values = torch.zeros(2, 4, 2048)  # two views of one storage

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(self.norm(self.embedding(ids))) * self.scale
        return result


def add_one(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.add_(1)


def add_one_elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """In a thread of torch that is not Python's, as those that share large tensors among them."""
    result: torch.Tensor = torch.jit.wait(torch.jit.fork(add_one, tensor))
    return result


def digest_of(model: Any) -> str:
    tensors = [*model.state_dict().values(), model.keys, model.values]
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def train(model: nn.Module) -> None:
    model.train()
    model(IDS).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


# --- writes: each is asked for by its name --------------------------------------------------------------------------


def batchnorm_in_train_mode(model: Model) -> None:
    model.norm.train()
    model(IDS)


def cache_in_a_buffer(model: Model) -> None:
    model.cache[:, :5] += 1


def caches_in_one_storage(model: Model) -> None:
    model.keys[:, :5] += 1


def embedding_with_max_norm(model: Model) -> None:
    model.embedding.max_norm = 1.0
    model(IDS)


def data_of_a_small_parameter(model: Model) -> None:
    model.scale.data.add_(1)


def data_of_a_parameter(model: Model) -> None:
    model.linear.weight.data.add_(1)


def array_over_a_parameter(model: Model) -> None:
    model.linear.weight.detach().numpy()[7] = 0


def parameter_in_a_thread_of_torch(model: Model) -> None:
    torch.jit.script(add_one_elsewhere)(model.linear.weight.data)


def state_dict_into_the_model(model: Model) -> None:
    model.load_state_dict(Model(seed=1).state_dict())


def optimiser_step(model: Model) -> None:
    train(model)


def write(ref: ModelRef, name: str) -> None:
    model = load_ref(ref)
    before = digest_of(model)
    tell(protection=loading.loads[-1].protection)
    globals()[name](model)
    tell(written=digest_of(model) != before, seen_by_the_next=digest_of(load_ref(ref)) != before)


def write_at_exit(ref: ModelRef) -> None:
    loaded: list[Any] = []
    # Registered before anything is loaded, and so among the last to run.
    atexit.register(lambda: data_of_a_parameter(loaded[0]))
    loaded.append(load_ref(ref))
    tell(protection=loading.loads[-1].protection)
    sys.exit()


def write_after_a_twin_is_gone(ref: ModelRef) -> None:
    """Two arrays over one object, as threads get them that ask for it at once."""
    model: Any = load_ref(ref)
    store_of(ref)._mapped.clear()
    load_ref(ref)
    forget_what_was_dropped(ref)
    tell(protection=loading.loads[-1].protection)
    data_of_a_parameter(model)
    tell(written=True)


def write_after_a_variant_is_gone(ref: ModelRef, variant: ModelRef) -> None:
    model: Any = load_ref(ref)
    load_ref(variant)
    forget_what_was_dropped(ref)
    tell(protection=loading.loads[-1].protection)
    data_of_a_parameter(model)
    tell(written=True)


# --- uses: what is done to the original and to what was loaded, and all that came of it -----------------------------


def gradients(model: Model) -> list[Any]:
    model(IDS).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def train_mode(model: Model) -> list[Any]:
    model.train()
    return [model(IDS), model.norm.running_mean, model.norm.num_batches_tracked]


def another_dtype(model: Model) -> list[Any]:
    model.to(torch.float64)
    return [model(IDS), *model.parameters()]


def half(model: Model) -> list[Any]:
    return list(model.half().state_dict().values())


def training_after_a_cast(model: Model) -> list[Any]:
    train(model.double())
    return list(model.parameters())


def training_of_a_copy(model: Model) -> list[Any]:
    mine = copy.deepcopy(model)
    train(mine)
    return list(mine.parameters())


def training(model: Model) -> list[Any]:
    train(model)
    return list(model.parameters())


def use(ref: ModelRef, names: list[str]) -> None:
    for name in names:
        # Where it is loaded must not matter.
        with torch.inference_mode(name == "gradients"):
            model = load_ref(ref)
        results = (globals()[name](each) for each in (Model().eval(), model))
        tell(**{name: all(torch.equal(*pair) for pair in zip(*results, strict=True))})
    tell(protection=loading.loads[-1].protection)


def lend(ref: ModelRef) -> None:
    """Blocks of a model that writes to small tensors of its own, behind torch's back."""
    met = []
    for _ in range(3):
        with loading.residents.lend(ref, "cpu", "refuse") as model:
            met.append(digest_of(model))
            data_of_a_small_parameter(model)  # type: ignore[arg-type]
            model.cache.numpy()[:] += 1  # type: ignore[operator]
    tell(protection=loading.loads[-1].protection, blocks=met)


# --- the life of a mapping ------------------------------------------------------------------------------------------


class Footprint(NamedTuple):
    maps: int
    mapped: int
    protected: int
    descriptors: int
    threads: int
    private: int


def footprint() -> Footprint:
    maps = Path("/proc/self/maps").read_text()
    return Footprint(
        maps=len(maps.splitlines()),
        mapped=len(re.findall(r" r[w-]-p .*(?:plasma|weights)", maps)),
        protected=len(re.findall(r" r--s .*plasma", maps)),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        private=process_memory().private,
    )


def load_and_drop(refs: list[ModelRef], times: int) -> None:
    """Load models and write to them, if that is possible; tell what the process had before and after."""

    def go(times: int) -> None:
        for number in range(times):
            model: Any = load_ref(refs[number % len(refs)])
            if loading.loads[-1].protection == "copy-on-write":
                model.linear.weight.data.add_(1)

    def settle() -> None:
        gc.collect()
        for store in stores._open.values():
            # The Ray store keeps its objects for a moment, and a timer for that.
            wait_until(lambda store=store: not getattr(store, "_mapped", ()))  # type: ignore[misc]
        wait_until(lambda: not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()))

    torch.set_num_threads(1)
    ray_store.KEPT = 0.1
    go(times // 10)
    settle()
    before = footprint()
    go(times)
    settle()
    tell(protection=loading.loads[-1].protection, before=before, after=footprint())


def outlive(ref: ModelRef) -> None:
    """A view of a model whose object is deleted; then the end of the view."""
    store = store_of(ref)
    model: Any = load_ref(ref)
    tell(protection=loading.loads[-1].protection)
    others = Others(store._mapped[ref.digest])
    view = model.linear.weight.detach()[3:5]
    before = view.clone()
    del model
    store.forget(ref.digest)
    gc.collect()
    tell(taken_while_in_use=any(others.take() for _ in range(40)), changed_while_in_use=not torch.equal(view, before))
    del view
    wait_until(others.take)
    tell(taken_afterwards=True)


def leave(ref: ModelRef) -> None:
    """A model that is loaded from a Ray which is left, goes on, and gives its memory to others."""
    model: Any = load_ref(ref)
    tell(protection=loading.loads[-1].protection)
    before = digest_of(model)
    others = Others(store_of(ref)._mapped[ref.digest])
    kept = loading.residents
    with kept.lend(ref, "cpu", "refuse"):
        pass
    stores.drop_store(store_of(ref))
    tell(spares=len(kept._free))
    store_of(ref).forget(ref.digest)
    wait_until(others.take)
    tell(changed=digest_of(model) != before)
    data_of_a_parameter(model)
    tell(writable=digest_of(model) != before)
    private = process_memory().private
    del model
    gc.collect()
    tell(freed=private - process_memory().private)


def forget_what_was_dropped(ref: ModelRef) -> None:
    gc.collect()
    store_of(ref)._kept.clear()


def store_of(ref: ModelRef) -> Any:
    return stores.open_store(ref.store)


class Others:
    """Objects of others, put until one lies where an object was."""

    def __init__(self, found: Plasma):
        self._place, self._nbytes = found.start, found.nbytes
        self._held: list[Any] = []

    def take(self) -> bool:
        """Put one, and whether it lies there."""
        if len(self._held) == 40:
            self._held.clear()
        self._held.append(ray.put(np.full(self._nbytes, 7, np.uint8)))
        place = Plasma(ray.get(self._held[-1])).start
        return abs(place - self._place) < self._nbytes


# --- the process ----------------------------------------------------------------------------------------------------


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def drop_rights() -> None:
    """Give up what it takes to look into the raylet: capabilities that it has, or the user namespace that it is in."""
    libc = ctypes.CDLL(None, use_errno=True)
    user = os.geteuid()
    if user == 0:
        version_3, itself = 0x20080522, 0
        done = libc.capset((ctypes.c_uint32 * 2)(version_3, itself), (ctypes.c_uint32 * 6)())
    else:
        clone_newuser = 0x10000000
        done = libc.unshare(clone_newuser)
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    if done != 0:
        raise OSError(ctypes.get_errno(), "rights cannot be given up here")


class Outcome(NamedTuple):
    """How a reader ended: exit status (less than 0: a signal), the facts it told, and its standard error."""

    status: int
    facts: dict[str, Any]
    errors: str


class Readers:
    """The process that forks readers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import readers; readers.serve()"],
            env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, name: str, *arguments: Any, fewer_rights: bool = False) -> Outcome:
        """Have a reader call the function of that name."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([fewer_rights, name, *arguments], default=vars), file=self._process.stdin, flush=True)
        status, output, errors = json.loads(self._process.stdout.readline())
        facts: dict[str, Any] = {}
        for line in output.splitlines():
            facts |= json.loads(line)
        return Outcome(status, facts, errors)

    def close(self) -> None:
        self._process.communicate()


def serve() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # imports what takes a second
    assert threading.active_count() == 1, "a fork of several threads may hang"
    for line in sys.stdin:
        fewer_rights, name, *arguments = json.loads(line, object_hook=lambda fields: ModelRef(**fields))
        with tempfile.TemporaryFile("r+") as output, tempfile.TemporaryFile("r+") as errors:
            child = os.fork()
            if child == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                signal.alarm(60)
                if fewer_rights:
                    drop_rights()
                globals()[name](*arguments)
                # Ray takes a second for its end, which is no concern of most.
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            errors.seek(0)
            print(json.dumps([status, output.read(), errors.read()]), flush=True)
