"""Variants that share memory with a base: the same models, in less memory, from both stores."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zcinfer as zc
from zcinfer import catalog, loading
from zcinfer.description import TAIL
from zcinfer.errors import ModelNotFound
from zcinfer.parts import join, split
from zcinfer.store import Store

# Other processes find the classes here.
WITH_TESTS = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}


class Net(nn.Module):
    """A body, a head, two tensors of equal content, a tie, a view, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        self.head = nn.Linear(64, 8)
        self.first, self.second = nn.Parameter(torch.zeros(500)), nn.Parameter(torch.zeros(500))
        self.tied = self.first
        self.register_buffer("table", torch.arange(3000.0).to(torch.bfloat16))
        self.part = self.body[0].weight.detach()[:10]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(x)) + self.first.sum() + self.table[:8] + self.part.mean()
        return result


def fine_tuned(seed: int = 1) -> Net:
    model = Net().eval()
    torch.manual_seed(seed)
    nn.init.normal_(model.head.weight)
    return model


@pytest.fixture(scope="module", params=["file", pytest.param("ray", marks=pytest.mark.ray)])
def connected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    settings = {
        "zcinfer.registry": str(tmp_path_factory.mktemp("base") / "registry"),
        "zcinfer.ray.object-store-memory": "200 MB",
    }
    with dask.config.set(settings):
        catalog.connect(request.param)
        yield
        loading.residents.clear()
        catalog.disconnect()


@pytest.fixture
def store(connected: None) -> Iterator[Store]:
    """A connected store with the base in it; empty again afterwards."""
    zc.put(Net().eval(), "base")
    yield zc.connect()
    loading.residents.clear()
    for name in set(zc.models()["name"]):
        zc.delete(name)


def same(model: nn.Module, expected: nn.Module) -> bool:
    x = torch.linspace(-1, 1, 128).reshape(2, 64)
    states = model.state_dict(), expected.state_dict()
    return (
        states[0].keys() == states[1].keys()
        and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        and torch.equal(model(x), expected(x))
    )


def test_a_variant_is_what_it_was(store: Store) -> None:
    zc.put(fine_tuned(), "variant", base="base")
    model = zc.load("variant")
    assert same(model, fine_tuned())
    assert model.tied is model.first
    assert model.part.data_ptr() == model.body[0].weight.data_ptr()
    assert same(zc.load("base"), Net().eval())


def test_equal_tensors_stay_two(store: Store) -> None:
    zc.put(fine_tuned(), "variant", base="base")
    model = zc.load("variant")
    model.first.data.fill_(7)
    assert not model.second.any()


def test_own_and_base_bytes_are_told(store: Store) -> None:
    zc.put(fine_tuned(), "variant", base="base")
    table = zc.models().set_index("name")
    whole, own, base = (int(table.loc["variant", column]) for column in ("nbytes", "own", "base"))
    assert whole == own + base
    assert own == 64 * 8 * 4 + TAIL
    assert (table.loc["base", "own"], table.loc["base", "base"]) == (whole, 0)


@pytest.mark.parametrize("connected", ["ray"], indirect=True)
def test_a_store_holds_only_what_differs(store: Any) -> None:
    before = store.usage()[1]
    for seed in range(5):
        zc.put(fine_tuned(seed), f"variant-{seed}", base="base")
    assert store.usage()[1] - before == 5 * (64 * 8 * 4 + TAIL)
    for seed in range(5):
        assert same(zc.load(f"variant-{seed}"), fine_tuned(seed))


def test_writes_reach_neither_base_nor_variant(store: Store) -> None:
    zc.put(fine_tuned(), "variant", base="base")
    model = zc.load("variant")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    assert same(zc.load("variant"), fine_tuned())
    assert same(zc.load("base"), Net().eval())


def test_a_write_into_the_base_s_pages_is_seen(store: Store) -> None:
    ref = zc.put(fine_tuned(), "variant", base="base")
    with loading.residents.lend(catalog.ready(ref), "cpu", "refuse") as first:
        first.body[0].weight.numpy(force=True)[0, 0] = 5  # behind torch's back
    with loading.residents.lend(catalog.ready(ref), "cpu", "refuse") as second:
        assert second is not first
        assert same(second, fine_tuned())


def test_the_archive_is_whole(store: Store, tmp_path: Path) -> None:
    zc.put(fine_tuned(), "variant", base="base")
    zc.save("variant", tmp_path / "archive")
    zc.delete("variant")
    zc.delete("base")
    zc.put(tmp_path / "archive", "again")
    assert same(zc.load("again"), fine_tuned())


def test_a_base_stays_as_long_as_its_variants(store: Store) -> None:
    zc.put(fine_tuned(), "variant", base="base")
    archives = catalog.registry().directory / "archives"
    zc.delete("base")
    assert len(list(archives.iterdir())) == 2
    assert same(zc.load("variant"), fine_tuned())
    zc.delete("variant")
    assert not list(archives.iterdir())
    assert not list((catalog.registry().directory / "bases").iterdir())


def test_the_base_of_a_base_is_the_base(store: Store) -> None:
    zc.put(fine_tuned(1), "variant", base="base")
    zc.put(fine_tuned(2), "other", base="variant")
    table = zc.models().set_index("name")
    assert table.loc["other", "own"] == table.loc["variant", "own"]
    assert same(zc.load("other"), fine_tuned(2))


def test_a_base_gets_no_base_of_its_own(store: Store) -> None:
    zc.put(fine_tuned(1), "variant", base="base")
    zc.put(fine_tuned(2), "new")
    zc.put(Net().eval(), "base", base="new")
    assert zc.models().set_index("name").loc["base", "base"] == 0
    assert same(zc.load("variant"), fine_tuned(1))
    assert same(zc.load("base"), Net().eval())


def test_the_same_content_with_and_without_base_is_one_version(store: Store) -> None:
    alone = zc.put(fine_tuned(), "variant")
    assert zc.put(fine_tuned(), "variant", base="base") == alone
    assert same(zc.load("variant"), fine_tuned())


def test_nothing_in_common_is_told(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    zc.put(nn.Linear(3, 3).eval(), "stranger", base="base")
    assert "stranger has no tensor in common with its base base" in caplog.text
    assert zc.models().set_index("name").loc["stranger", "base"] == 0


def test_an_unknown_base_is_refused(store: Store) -> None:
    with pytest.raises(ModelNotFound, match="Did you mean 'base'"):
        zc.put(fine_tuned(), "variant", base="bases")
    assert set(zc.models()["name"]) == {"base"}


@pytest.mark.parametrize("connected", ["file"], indirect=True)
def test_a_base_that_is_damaged_costs_memory_only(store: Store) -> None:
    zc.put(fine_tuned(), "variant", base="base")
    base = catalog.resolve("base").digest
    (store.registry.directory / "archives" / base / "description.json").write_text("{")
    assert same(loading.load_ref(catalog.resolve("variant")), fine_tuned())


@pytest.mark.parametrize("connected", ["file"], indirect=True)
def test_a_base_whose_weights_are_altered_costs_memory_only(store: Store) -> None:
    zc.put(fine_tuned(), "variant", base="base")
    weights = store.registry.directory / "archives" / catalog.resolve("base").digest / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[4096:8192] = bytes(4096)
    weights.write_bytes(content)
    assert same(loading.load_ref(catalog.resolve("variant")), fine_tuned())


def test_a_damaged_note_of_the_base_costs_memory_only(store: Store) -> None:
    ref = zc.put(fine_tuned(), "variant", base="base")
    (store.registry.directory / "bases" / ref.digest).write_bytes(b"\xff\xfe")
    assert set(zc.models()["name"]) == {"base", "variant"}
    assert same(zc.load("variant"), fine_tuned())


def test_a_model_is_no_base_of_itself(store: Store) -> None:
    zc.put(Net().eval(), "same", base="base")
    assert zc.models().set_index("name").loc["same", "base"] == 0
    assert same(zc.load("same"), Net().eval())


OTHER_PROGRAM = """
import copy, sys, torch, zcinfer as zc
from zcinfer import catalog
catalog.connect("file:" + sys.argv[1])
model = zc.load("middle")
zc.delete("middle")
zc.put(model, "middle")
"""


def test_a_base_that_was_a_variant_when_it_was_stored(store: Store) -> None:
    """The store then has only a part of it as its own."""
    zc.put(fine_tuned(1), "middle", base="base")
    zc.load("middle")
    directory = store.registry.directory
    subprocess.run([sys.executable, "-c", OTHER_PROGRAM, str(directory)], env=WITH_TESTS, check=True)
    last = fine_tuned(1)
    nn.init.ones_(last.head.bias)
    zc.put(last, "last", base="middle")
    expected = fine_tuned(1)
    nn.init.ones_(expected.head.bias)
    assert same(zc.load("last"), expected)
    assert same(zc.load("middle"), fine_tuned(1))


READER = """
import sys
import torch, zcinfer as zc
from zcinfer import loading, catalog
zc.connect(sys.argv[1])
model = zc.load("variant")
x = torch.linspace(-1, 1, 16)[None]
with torch.no_grad():
    print(model(x).numpy().tobytes().hex())
"""


def test_another_process_reads_a_variant(store: Store) -> None:
    model = nn.Sequential(nn.Linear(16, 300), nn.Linear(300, 4)).eval()
    zc.put(model, "plain")
    tuned = copy.deepcopy(model)
    nn.init.ones_(tuned[1].bias)
    zc.put(tuned, "variant", base="plain")
    done = subprocess.run([sys.executable, "-c", READER, store.url], stdout=subprocess.PIPE, text=True, check=True)
    with torch.no_grad():
        assert done.stdout.strip() == tuned(torch.linspace(-1, 1, 16)[None]).numpy().tobytes().hex()


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6), st.booleans())
def test_any_two_tables_give_both_models_back(kinds: list[int], others: list[int], own: bool) -> None:
    base, variant = (
        split(nn.ParameterList([torch.full((300,), float(kind)) for kind in each])) for each in (kinds, others)
    )
    over = variant.description.over(base.description, own)
    places = [over.storages[number].offset for number in over.in_base]
    assert len(set(places)) == len(places)
    whole = np.frombuffer(bytearray(b"".join(base.pieces())), np.uint8)
    mine = np.zeros(over.nbytes, np.uint8)
    for number, source in enumerate(variant.sources):
        if number not in over.in_base:
            start = over.storages[number].offset
            mine[start : start + source.nbytes] = source
    model = join(variant.skeleton, over, mine, base=whole)
    assert [int(tensor[0]) for tensor in model] == others  # type: ignore[attr-defined]
    assert len(over.in_base) == sum(min(kinds.count(kind), others.count(kind)) for kind in range(4))
