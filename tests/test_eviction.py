"""Stores that fill: what does not fit is refused with sizes, what nobody uses goes if it may, and disks are told of.

The Ray is a real one, of 100 MB. Readers are processes of their own.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import ray
import torch
from click.testing import CliRunner
from processes import wait_until

from zcinfer import catalog, loading, publishing
from zcinfer.cli import main
from zcinfer.errors import StoreFull
from zcinfer.holder import are_mapped
from zcinfer.occupancy import is_mapped, mapped_spans
from zcinfer.registry import Registry
from zcinfer.sharing import map_file
from zcinfer.store import ModelRef, disk_budget

pytestmark = pytest.mark.slow

MB = 1_000_000


def model(number: int, megabytes: int = 25) -> torch.nn.Module:
    layer = torch.nn.Linear(megabytes * MB // 4000, 1000, bias=False).eval()
    with torch.no_grad():
        layer.weight.fill_(number)
    return layer


class Reader:
    """A process that has a model mapped until it is told to drop it, or is killed."""

    SCRIPT = """
import json, sys
from zcinfer.loading import load_ref, loads
from zcinfer.store import ModelRef
model = load_ref(ModelRef(**json.loads(sys.argv[1])))
print(loads[-1].store, float(model.weight.detach().flatten()[-1]), flush=True)
sys.stdin.readline()
print(float(model.weight.detach().min()), float(model.weight.detach().max()), flush=True)
sys.stdin.readline()
"""

    def __init__(self, ref: ModelRef, store: Any):
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, json.dumps(vars(replace(ref, store=store.url)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline().split()

    def sums(self) -> list[str]:
        """Smallest and largest of its weights now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return self._process.stdout.readline().split()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("full") / "registry"
    settings = {"zcinfer.registry": str(directory), "zcinfer.ray.object-store-memory": "100 MB"}
    with dask.config.set(settings):
        store = catalog.connect("ray")
        yield store
        loading.residents.clear()
        catalog.disconnect()


@pytest.fixture
def empty(store: Any) -> Iterator[Any]:
    for name in store.registry.names.all():
        catalog.delete(name)
    yield store
    for name in store.registry.names.all():
        catalog.delete(name)


def held(store: Any) -> set[str]:
    """Names of the models that are in the store's memory."""
    names = {version.digest: version.name for version in store.registry.names.versions()}
    return {names[digest] for digest in store.usage()[2]}


@pytest.mark.ray
def test_what_nobody_uses_goes_in_the_order_of_its_last_use(empty: Any, caplog: pytest.LogCaptureFixture) -> None:
    refs = {name: publishing.put(model(number), name) for number, name in enumerate("abc")}
    reader = Reader(refs["b"], empty)
    assert reader.said == ["ray", "1.0"]
    wait_until(lambda: refs["b"].digest in empty.budget().in_use)
    empty.publish(refs["a"].digest)  # as somebody who asks for it; now c is the one used longest ago
    with pytest.raises(StoreFull, match=r"b@1 \(25\.. MB, in use\).*STORE_EVICTION"):
        publishing.put(model(3), "d")
    with dask.config.set({"zcinfer.store-eviction": True}), caplog.at_level(logging.WARNING, "zcinfer"):
        publishing.put(model(3), "d")
        assert held(empty) == {"a", "b", "d"}
        assert "c@1 left the shared memory" in caplog.text
        # What is mapped stays, though it was used longest ago, even if that means to refuse.
        publishing.put(model(4), "e")
        assert held(empty) == {"b", "d", "e"}
        with pytest.raises(StoreFull, match=r"100\.0 MB are taken.*b@1 \(25\.. MB, in use\)"):
            publishing.put(model(5, 75), "f")
        assert held(empty) == {"b", "d", "e"}
        assert reader.sums() == ["1.0", "1.0"]
        reader.end()
        # The kernel knows that a killed reader uses nothing. What went comes back when it is asked for.
        assert publishing.load("a").weight[0, 0] == 0
        assert held(empty) == {"a", "d", "e"}
        assert empty.budget().evicted == 3
    assert empty.budget().on_disk == 0


@pytest.mark.ray
def test_a_base_stays_as_long_as_its_variant(empty: Any) -> None:
    base = torch.nn.Sequential(model(1), torch.nn.Linear(10, 10)).eval()
    variant = torch.nn.Sequential(model(1), torch.nn.Linear(10, 10)).eval()
    publishing.put(base, "base")
    publishing.put(variant, "variant", base="base")
    with dask.config.set({"zcinfer.store-eviction": True}):
        publishing.put(model(2), "x")
        publishing.put(model(3), "y")
        # The variant is used longest ago, but frees next to nothing; the base is in use by it.
        with pytest.raises(StoreFull, match=r"base@1 \(25\.. MB, in use\)"):
            publishing.put(model(4, 75), "z")
    assert held(empty) == {"base", "variant", "x", "y"}


@pytest.mark.ray
def test_memory_that_others_have_filled_is_told(empty: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Ray moves a model to its disk for others' objects, and reads it into a file there when it is asked for."""
    import ray

    ref = publishing.put(model(7), "moved")
    others = []
    for number in range(5):
        others.append(ray.get(ray.put(np.full(23 * MB, number, np.uint8))))
        others.append(ray.get(ray.put(np.full(1 * MB, number, np.uint8))))
    wait_until(lambda: empty.budget().spilled > 25 * MB)
    with caplog.at_level(logging.WARNING, "zcinfer"):
        loaded = publishing.load(ref)
    assert loaded.weight.min() == loaded.weight.max() == 7
    assert "lie in a file on this machine's disk" in caplog.text
    budget = empty.budget()
    assert budget.on_disk > 25 * MB
    told = CliRunner().invoke(main, ["ls", "--store", empty.url], catch_exceptions=False).output
    assert "moved" in told
    assert "had no room and lie on disk" in told
    assert "written to disk since its start" in told
    del others


def test_mappings_of_readers_are_seen_and_those_of_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(20 * 4096))
    status = path.stat()
    file = status.st_dev, status.st_ino
    shared = np.memmap(path, np.uint8, "r+")
    assert mapped_spans(*file) == []
    private = map_file(path, 3 * 4096 + 5, 2 * 4096)
    spans = mapped_spans(*file)
    assert [is_mapped(place * 4096, spans) for place in range(7)] == [False] * 3 + [True] * 3 + [False]
    del private
    assert mapped_spans(*file) == []
    assert shared.nbytes == 20 * 4096


@pytest.mark.parametrize(("error", "stays"), [("GetTimeoutError", True), ("ObjectLostError", False)])
def test_a_model_that_cannot_be_looked_at_stays_unless_it_is_lost(error: str, stays: bool) -> None:
    def get(_: object, timeout: float) -> Any:
        raise getattr(ray.exceptions, error).__new__(getattr(ray.exceptions, error))

    assert are_mapped([object()], get) == [stays]


def test_budgets_of_a_disk(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "not" / "there")
    budget = disk_budget(registry)
    assert (budget.used, budget.models) == (0, {})
    assert budget.capacity > 0
