"""One contract for both stores. The Ray store is a real one of our own, shared by this module's tests.

That readers do not meet each other's writes is in test_safety.
"""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
from processes import wait_until

from zcinfer import catalog, loading, publishing
from zcinfer.errors import ModelNotFound, StoreUnavailable
from zcinfer.parts import join, split
from zcinfer.ray_store import RayStore
from zcinfer.registry import Registry
from zcinfer.store import FileStore, ModelRef, Store


def model(seed: int = 0, width: int = 300) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width)).eval()


def run(script: str, *arguments: str, timeout: float = 60) -> str:
    """Standard output of a Python script in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ray_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    directory = tmp_path_factory.mktemp("ray") / "registry"
    with dask.config.set({"zcinfer.registry": str(directory), "zcinfer.ray.object-store-memory": "200 MB"}):
        store = catalog.connect("ray")
        yield store
        catalog.disconnect()


@pytest.fixture(params=["file", pytest.param("ray", marks=pytest.mark.ray)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "ray":
        found: Store = request.getfixturevalue("ray_store")
        return found
    return FileStore(tmp_path / "registry")


def put(store: Store, module: torch.nn.Module, name: str = "model") -> str:
    digest = store.registry.add(split(module), name).digest
    store.publish(digest)
    return digest


def build(store: Store, digest: str) -> Any:
    fetched = store.fetch(digest)
    return join(fetched.skeleton, fetched.description, fetched.buffer)


def test_what_is_put_comes_back_bit_for_bit(store: Store) -> None:
    original = model()
    copy = build(store, put(store, original))
    x = torch.randn(5, 300)
    assert torch.equal(copy(x), original(x))
    assert {n: t.dtype for n, t in copy.state_dict().items()} == {n: t.dtype for n, t in original.state_dict().items()}


def test_publishing_again_changes_nothing(store: Store) -> None:
    first = put(store, model())
    assert put(store, model()) == first


def test_an_unknown_digest_is_refused(store: Store) -> None:
    with pytest.raises(ModelNotFound):
        store.fetch("0" * 64)


def test_a_forgotten_model_is_filled_again_from_the_registry(store: Store) -> None:
    digest = put(store, model())
    store.forget(digest)
    assert torch.equal(build(store, digest)[0].weight, model()[0].weight)


def test_its_condition_tells_what_it_holds(store: Any) -> None:
    digest = put(store, torch.nn.Linear(1000, 1000).eval(), "measured")
    held = build(store, digest)
    found = store.condition()
    assert (found.healthy, found.store) == (True, store.url.partition("?")[0])
    sizes = found.sizes
    if isinstance(store, FileStore):
        nbytes = (store.registry.directory / "archives" / digest / "weights.safetensors").stat().st_size
        assert (sizes["mapped"], sizes["cached"], found.holder) == (nbytes, nbytes, "")
        assert sizes["free"] > 0
    else:
        # More than the models: the raylet tells of all objects.
        assert store.usage()[1] <= sizes["used"] < sizes["capacity"] == 200_000_000
        assert (sizes["spilled"], sizes["fallback"]) == (0, 0)
        assert found.holder.startswith("alive")
    assert held.weight.shape == (1000, 1000)


def test_protection_is_reported(store: Store) -> None:
    assert store.fetch(put(store, model())).protection == "copy-on-write"


# --- what only Ray can do wrong ------------------------------------------------------------------------------------


@pytest.mark.ray
def test_two_processes_share_one_copy(ray_store: Store) -> None:
    big = torch.nn.Linear(3000, 3000).eval()
    digest = put(ray_store, big, "big")
    script = """
import gc, sys
from zcinfer.loading import load_ref
from zcinfer.stores import open_store
from zcinfer.memory import process_memory
from zcinfer.store import ModelRef
ref = ModelRef("big", 1, sys.argv[1], 0, sys.argv[2])
import torch
torch.ones(10).sum()
open_store(ref.store)
gc.collect()
before = process_memory()
m = load_ref(ref)
total = sum(p.detach().sum() for p in m.parameters())
after = process_memory()
print(after.private - before.private, after.shared - before.shared)
"""
    private, shared = map(int, run(script, digest, ray_store.url).split())
    assert private < 5e6
    assert shared > 30e6


@pytest.mark.ray
def test_a_killed_holder_is_replaced_and_puts_again(ray_store: Any) -> None:
    import ray

    digest = put(ray_store, model(seed=3), "held")
    kept = build(ray_store, digest)
    ray.kill(ray_store._holder, no_restart=False)
    assert torch.equal(kept[0].weight, model(seed=3)[0].weight)
    # From another process, which has nothing mapped yet.
    script = """
import sys
import threading
from zcinfer.loading import load_ref, loads
from zcinfer.store import ModelRef
m = load_ref(ModelRef("held", 1, sys.argv[1], 0, sys.argv[2]))
print(loads[-1].store)
"""
    assert run(script, digest, ray_store.url).strip() == "ray"


@pytest.mark.ray
def test_the_condition_of_a_killed_holder_is_told(ray_store: Any) -> None:
    import ray

    before = ray_store.condition().holder
    ray.kill(ray_store._holder, no_restart=False)
    wait_until(lambda: (found := ray_store.condition()).healthy and found.holder != before)
    assert re.fullmatch(r"alive, after \d+ restarts?", ray_store.condition().holder)


@pytest.mark.slow
@pytest.mark.ray
def test_what_lies_in_files_since_memory_was_full_is_told(ray_store: Any) -> None:
    import ray

    big = np.zeros(110_000_000, np.uint8)
    first = ray.put(big)
    pinned = ray.get(first)  # cannot be spilled
    second = ray.put(big)
    wait_until(lambda: ray_store.condition().sizes["fallback"] >= big.nbytes)
    assert ray_store.condition().sizes["used"] >= big.nbytes
    del first, second, pinned
    wait_until(lambda: ray_store.condition().sizes["fallback"] == 0)


@pytest.mark.ray
def test_a_full_store_gives_sizes_and_names(ray_store: Store) -> None:
    from zcinfer.errors import StoreFull

    put(ray_store, model(seed=4), "small")
    too_big = torch.nn.Linear(8000, 8000, bias=False).eval()
    with pytest.raises(StoreFull, match=r"256\.0 MB does not fit.*200\.0 MB.*small@1.*zcinfer rm"):
        publishing.put(too_big, "too-big")
    # Refused before it begins: nothing is left to delete.
    assert "too-big" not in Registry(ray_store.registry.directory).names.all()


@pytest.mark.ray
def test_a_ref_is_small_and_picklable(ray_store: Store) -> None:
    ref = publishing.put(model(), "refs")
    assert pickle.loads(pickle.dumps(ref)) == ref
    assert len(pickle.dumps(ref)) < 500
    assert hash(ref) == hash(publishing.put(model(), "refs"))


@pytest.mark.ray
def test_deleting_frees_the_shared_memory(ray_store: Any) -> None:
    publishing.put(torch.nn.Linear(3000, 3000, bias=False).eval(), "gone")
    used = ray_store.usage()[1]
    catalog.delete("gone")
    assert ray_store.usage()[1] <= used - 36e6
    wait_until(lambda: "gone" not in set(catalog.models()["name"]))


@pytest.mark.ray
def test_a_ray_that_was_slow_once_is_asked_again_soon(ray_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcinfer.ray_store._RESPITE", 0.2)
    late = threading.Event()

    def respite() -> float:
        """Seconds for which nothing is asked after a call that was too slow."""
        with pytest.raises(StoreUnavailable, match="has not answered within"):
            ray_store._within(0.01, late.wait)
        begin = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"is asked again in \d s"):
            ray_store._within(1, int)
        wait_until(lambda: time.monotonic() > ray_store._retry_at)
        return time.monotonic() - begin

    try:
        assert [respite() > least for least in (0.15, 0.35, 0.7)] == [True, True, True]
        assert ray_store._within(5, lambda: "answered") == "answered"
        with pytest.raises(StoreUnavailable, match="has not answered within"):
            ray_store._within(0.01, late.wait)
        with pytest.raises(ModelNotFound):  # an answer: who brings a model waits until it is asked again
            ray_store.bring("0" * 64)
        assert 0.15 < respite() < 0.35
    finally:
        late.set()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "127.0.0.1:port", "no-such-host.invalid:6379"])
def test_an_address_where_nothing_answers_is_refused_in_time(address: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable, match="no Ray answers"):
        RayStore(address, Registry(tmp_path))
    assert time.monotonic() - begin < 10


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_that_is_no_ray_is_refused_in_time(tmp_path: Path) -> None:
    script = """
import socket, sys, time
import zcinfer as zc
from zcinfer import ray_store
server = socket.create_server(("127.0.0.1", 0))
begin = time.monotonic()
try:
    zc.connect("ray:127.0.0.1:%d" % server.getsockname()[1])
except zc.errors.StoreUnavailable as error:
    print(time.monotonic() - begin)
sys.stdout.flush()
"""
    assert float(run(script)) < 10


@pytest.mark.slow
@pytest.mark.ray
def test_a_dead_raylet_is_told_in_time_and_the_archive_serves(tmp_path: Path) -> None:
    script = """
import sys, time, psutil
import torch, zcinfer as zc
from zcinfer import loading
store = zc.connect("ray")
first = torch.nn.Linear(300, 300).eval()
zc.put(first, "first")
kept = zc.load("first")
ref = zc.put(torch.nn.Linear(301, 300).eval(), "second")
ours = psutil.Process(store._own._keeper.pid).children(recursive=True)
(raylet,) = [process for process in ours if process.name() == "raylet"]
raylet.kill()
raylet.wait(10)
deadline = time.monotonic() + 10
while store.alive:
    assert time.monotonic() < deadline
with store._session._leaving:
    pass
begin = time.monotonic()
model = loading.load_ref(ref)
print(store.condition().holder)
print(loading.loads[-1].store, time.monotonic() - begin, torch.equal(kept.weight, first.weight))
"""
    told = run(script, timeout=100)
    assert re.search(r"unavailable: Ray at \S+ has died; models that are loaded stay so", told)
    kind, seconds, kept = told.split()[-3:]
    assert (kind, kept) == ("file", "True")
    assert float(seconds) < 20


@pytest.mark.slow
@pytest.mark.ray
def test_a_process_moves_from_one_ray_to_another(ray_store: Store) -> None:
    digest = put(ray_store, model(), "moves")
    script = """
import gc, sys
import torch
from zcinfer import catalog, loading, publishing
from zcinfer.store import ModelRef
ref = ModelRef("moves", 1, sys.argv[1], 0, sys.argv[2])
first = loading.load_ref(ref)
total = float(first[0].weight.detach().double().sum())
own = catalog.connect("ray")  # its own: no Dask client, no RAY_ADDRESS
assert own.url != ref.store
second = publishing.load(publishing.put(torch.nn.Linear(300, 300).eval(), "mine"))
assert float(first[0].weight.detach().double().sum()) == total
del first
gc.collect()
back = loading.load_ref(ref)
assert loading.loads[-1].store == "ray", loading.loads[-1]
print(float(back[0].weight.detach().double().sum()) == total, second(torch.ones(2, 300)).shape)
"""
    assert run(script, digest, ray_store.url).strip() == "True torch.Size([2, 300])"


@pytest.mark.slow
@pytest.mark.ray
def test_a_process_connects_again_to_where_it_is(ray_store: Store) -> None:
    script = """
import sys
import threading
from zcinfer import catalog
for _ in range(3):
    catalog.connect("ray:" + sys.argv[1])
"""
    address = ray_store.url.removeprefix("ray:").partition("?")[0]
    done = subprocess.run([sys.executable, "-c", script, address], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")  # nor is Ray tried with a token that it refuses


def test_a_ref_names_its_version() -> None:
    assert str(ModelRef("bert", 3, "a" * 64, 1, "file:/x")) == "bert@3"


def test_the_last_loads_are_recorded(registry: Path) -> None:
    publishing.put(model(), "recorded")
    publishing.load("recorded")
    load = loading.loads[-1]
    assert (load.model, load.store, load.protection) == ("recorded@1", "file", "copy-on-write")
    assert set(load.seconds) >= {"fetch", "map", "join"}
    assert load.shared > 300 * 300 * 4
