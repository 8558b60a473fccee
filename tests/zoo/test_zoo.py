"""Every model of the zoo: taken apart and put together here, and loaded in another process from both stores."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
import torch

from zcinfer import catalog, loading
from zcinfer.parts import join, split
from zcinfer.publishing import put
from zoo import kinds
from zoo.compare import assert_same, buffer_of, compared, lies_in, state_of
from zoo.facts import filled, in_memory

PROGRAMS = [case for case in kinds.MODELS if case.startswith("scripted: ")]
# Torch's loader of programs, and a `__setstate__`, make weights of their own.
MAKE_WEIGHTS = [*PROGRAMS, "protocols: half of its state"]


class Taken:
    """A model taken apart, and put together again."""

    def __init__(self, case: str):
        self.case = case
        self.model, self.inputs = kinds.build(case)
        self.before = state_of(self.model)
        self.parts = split(self.model)
        self.buffer = buffer_of(self.parts)
        self.copy = join(self.parts.skeleton, self.parts.description, self.buffer)


@pytest.fixture(scope="module", params=kinds.MODELS)
def taken(request: pytest.FixtureRequest) -> Taken:
    return Taken(request.param)


def test_the_copy_has_the_same_structure_and_tensors(taken: Taken) -> None:
    assert_same(taken.model, taken.copy)
    modules = list(zip(taken.model.modules(), taken.copy.modules(), strict=True))
    for module, copy in modules if taken.case not in PROGRAMS else ():
        assert type(copy).__qualname__ == type(module).__qualname__


def test_the_model_is_untouched(taken: Taken) -> None:
    assert state_of(taken.model) == taken.before
    assert_same(kinds.build(taken.case)[0], taken.model)


def test_the_copy_has_the_same_description(taken: Taken) -> None:
    description, again = taken.parts.description, split(taken.copy).description
    assert again.digest == description.digest
    if taken.case not in PROGRAMS:  # in the bytes of a program are numbers that torch gives by process
        assert (again.tensors, again.storages) == (description.tensors, description.storages)


def test_no_storage_is_copied(taken: Taken) -> None:
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for _, t in in_memory(taken.model))}
    stored = sum(spec.nbytes for spec in taken.parts.description.storages)
    assert stored >= sum(storages.values())
    for name, tensor in in_memory(taken.copy) if taken.case not in MAKE_WEIGHTS else ():
        assert tensor.numel() == 0 or lies_in(taken.buffer, tensor), name


def test_the_copy_computes_the_same_bits(taken: Taken) -> None:
    """With gradients and without, and has changed itself as the model has."""
    assert compared(taken.model, taken.copy, taken.inputs) == []


def test_the_zoo_has_models_with_every_kind_of_tensor() -> None:
    """So that the tests above cannot pass by comparing nothing."""
    tensors = [tensor for case in kinds.MODELS for _, tensor in filled(kinds.build(case)[0])]
    sparse = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
    assert {t.layout for t in tensors} == {torch.strided, torch.jagged, *sparse}
    assert {t.requires_grad for t in tensors} == {True, False}
    assert {t.dtype for t in tensors} == {d for d in vars(torch).values() if isinstance(d, torch.dtype)}
    assert any(t.is_quantized for t in tensors)
    assert any(t.is_nested for t in tensors)
    assert any(not t.is_contiguous() for t in tensors if t.layout is torch.strided and not t.is_nested)
    assert any(t.__dict__ for t in tensors)


def test_every_kind_is_in_the_zoo() -> None:
    found = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py") if _has_models(path)}
    assert found == set(kinds.KINDS)


def _has_models(path: Path) -> bool:
    return "\nMODELS: Models = {" in path.read_text()


# --- in another process ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A registry with all models in it, each under the number that it has in the zoo."""
    directory = tmp_path_factory.mktemp("zoo") / "registry"
    with dask.config.set({"zcinfer.registry": str(directory)}):
        catalog.connect("file")
        for number, case in enumerate(kinds.MODELS):
            put(kinds.build(case)[0], f"zoo-{number}")
        catalog.disconnect()
    yield directory
    loading.residents.clear()


@pytest.fixture(scope="module", params=["file", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])])
def told(request: pytest.FixtureRequest, registry_of_all: Path) -> Iterator[dict[str, list[str]]]:
    """What one other process, in which nobody has put anything, found of each model that it loaded from a store."""
    settings = {"zcinfer.registry": str(registry_of_all), "zcinfer.ray.object-store-memory": "200 MB"}
    with dask.config.set(settings):
        catalog.connect(request.param)
        refs = {case: catalog.resolve(f"zoo-{number}") for number, case in enumerate(kinds.MODELS)}
        reader = [sys.executable, "-m", "zoo.reader"]
        tests = Path(__file__).parents[1]
        done = subprocess.run(
            reader, cwd=tests, input=pickle.dumps(refs), stdout=subprocess.PIPE, timeout=200, check=True
        )
        yield json.loads(done.stdout)
        catalog.disconnect()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", kinds.MODELS)
def test_another_process_loads_what_it_would_have_built(told: dict[str, list[str]], case: str) -> None:
    """And again after it has written to all memory of what it had loaded first."""
    assert told[case] == []
