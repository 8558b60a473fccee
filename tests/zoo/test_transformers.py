"""Hundreds of model classes of transformers, tiny and random, go through the store and come back as they were."""

from __future__ import annotations

import hashlib
import types
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import tiny
import torch
from torch.nn import Module

import zcinfer as zc

FEWEST = 200
PLAIN = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout}
EMPTY = {dict, OrderedDict, list, set}


class Facts:
    """All there is to know of an object, by the way to it: values, the bytes of tensors, and which objects are one."""

    def __init__(self, value: Any):
        self.found: dict[str, Any] = {}
        self.tensors = 0
        self._first: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no two objects have one id
        self._add("", value)

    def _parts(self, path: str, kind: Any, parts: Iterable[tuple[Any, Any]]) -> None:
        plain: list[tuple[Any, str]] = []
        for name, part in parts:
            if type(part) in PLAIN:
                plain.append((name, repr(part)))
            elif type(part) in EMPTY and not part:
                first = self._first.setdefault(id(part), (path, name))
                plain.append((name, repr(part) if first == (path, name) else f"the same as {first}"))
            else:
                self._add(f"{path}.{name}", part)
        self.found[path] = kind, plain

    def _add(self, path: str, value: Any) -> None:
        kind = type(value)
        if kind in PLAIN:
            self.found[path] = repr(value)
        elif isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
            self.found[path] = kind, getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__)
        elif kind is types.MethodType:
            self._parts(path, kind, [("function", value.__func__), ("self", value.__self__)])
        elif kind in (tuple, torch.Size):
            self._parts(path, kind, enumerate(value))
        elif id(value) in self._first:
            self.found[path] = f"the same as {self._first[id(value)]}"
        else:
            self._first[id(value)] = path
            self._kept.append(value)
            # Not the class itself: a parametrized module has one of its own.
            self._add_new(path, value, f"{kind.__module__}.{kind.__qualname__}")

    def _add_new(self, path: str, value: Any, kind: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors += 1
            storage = value.untyped_storage()
            self._kept.append(storage)
            flat = value.detach().contiguous().flatten()
            content = hashlib.sha1(flat.view(torch.uint8).numpy() if flat.numel() else b"").hexdigest()
            shape = value.dtype, value.layout, tuple(value.shape), value.stride(), value.storage_offset()
            flags = value.requires_grad, value.is_leaf, storage.nbytes()
            first = self._first.setdefault(storage._cdata, path)
            self._parts(path, (kind, content, shape, flags, "" if first == path else first), vars(value).items())
        elif isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            self._parts(path, (kind, value.__module__, value.__qualname__), enumerate(cells))
        elif isinstance(value, weakref.ref):
            self._parts(path, kind, [("referent", value())])
        elif isinstance(value, set | frozenset):
            self.found[path] = kind, sorted(map(repr, value))
        elif isinstance(value, list):
            self._parts(path, kind, enumerate(value))
        elif isinstance(value, dict):
            self._parts(path, (kind, list(map(repr, value))), value.items())
        elif isinstance(value, Module):
            self._parts(path, kind, sorted(vars(value).items()))
        else:  # what the object says itself that it is
            function, arguments, state, *iterators = reduced = (*value.__reduce_ex__(4), None)
            items = [list(iterator) for iterator in iterators if iterator is not None]
            self._kept += reduced, items
            parts = sorted(state.items()) if isinstance(state, dict) else [("state", state)]
            self._parts(path, kind, [("function", function), ("arguments", arguments), ("items", items), *parts])


def facts(model: Module) -> dict[str, Any]:
    return Facts((model, list(model.state_dict()), named(model))).found


def named(model: Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters and buffers; tied ones once for each name."""
    parameters = Module.named_parameters(model, remove_duplicate=False)
    return [*parameters, *Module.named_buffers(model, remove_duplicate=False)]


def identities(model: Module) -> list[tuple[int, int, int]]:
    """What tells that a tensor was written to or exchanged."""
    return [(id(tensor), tensor._version, tensor.data_ptr()) for _, tensor in named(model)]


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    told = []
    for path in dict.fromkeys([*expected, *found]):
        one, other = expected.get(path, "nothing"), found.get(path, "nothing")
        if one != other:
            if isinstance(one, tuple) and isinstance(other, tuple) and one[0] == other[0]:  # all but some is equal
                one, other = ([part for part in a[1] if part not in b[1]] for a, b in [(one, other), (other, one)])
            told.append(f"{path}: {one!s:.300} became {other!s:.300}")
    return told


def outcome(model: Module, inputs: dict[str, Any]) -> Facts:
    """What a call returns, or raises."""
    torch.manual_seed(2)
    try:
        with torch.no_grad():
            return Facts(model(**inputs))
    except Exception as error:  # these inputs are only guessed
        return Facts(repr(error))


def compared(model: Module, other: Module) -> tuple[bool, list[str]]:
    """Whether there were inputs to call both with, and in what they differ."""
    found = differences(facts(model), facts(other))
    for inputs in tiny.guesses(model):
        expected = outcome(model, inputs)
        found += differences(expected.found, outcome(other, inputs).found)
        if expected.tensors:
            # And both have changed themselves in the same way.
            return True, found + differences(Facts(named(model)).found, Facts(named(other)).found)
    return False, found


def through_the_store(name: str) -> tuple[str, list[str]]:
    """What came of a class, with the reasons or the differences."""
    try:
        model = tiny.build(name)
    except tiny.NotBuilt as error:
        return "not built", [str(error)]
    before, identical = facts(model), identities(model)
    try:
        zc.put(model, "tiny")
        other = zc.load("tiny")
        zc.delete("tiny")
    except zc.ZcinferError as error:
        return "refused", [f"{type(error).__name__}: {error}"]
    except Exception as error:
        return "by tensors", [f"put or load raises {error!r}"]
    wrong = [f"put changed the model: {what}" for what in differences(before, facts(model))]
    wrong += ["put wrote to a tensor, or put another in its place"] if identities(model) != identical else []
    by_output, differing = compared(model, other)
    return ("by output" if by_output else "by tensors"), wrong + differing


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformers without its warnings and the network, and torch on one thread: more only wait for these models."""
    import transformers

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("registry", "quiet")
def test_models_of_transformers_come_back(
    capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    names = tiny.classes()
    came_of = {name: through_the_store(name) for name in names}
    number = Counter(kind for kind, _ in came_of.values())
    wrong = {name: why for name, (kind, why) in came_of.items() if kind.startswith("by") and why}
    refused = {name: why for name, (kind, why) in came_of.items() if kind == "refused"}
    built = len(names) - number["not built"]
    summary = (
        f"transformers: {built} classes built, {number['by output']} compared by output, {number['by tensors']} by "
        f"tensors, {len(refused)} refused, {len(wrong)} wrong (of {len(names)}; {number['not built']} not built)"
    )
    record_property("transformers", summary)
    with capsys.disabled():
        print(f"\n{summary}")
    reasons = [f"{name}: {reason}" for name, some in (wrong | refused).items() for reason in some[:5]]
    why = "\n".join([summary, *reasons])
    assert not wrong, why
    assert len(refused) < built / 100, why
    assert built >= FEWEST, came_of
    assert number["by output"] >= built / 2, came_of
