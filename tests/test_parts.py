"""Splitting and joining: the copy lies in the buffer, the table says what is in it, and what cannot be split is named.

That the copy is the model, bit for bit and for every kind of model, is tested in `zoo`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import importlib
import io
import re
import socket
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo.compare import assert_same, buffer_of, lies_in, round_trip, state_of
from zoo.facts import named
from zoo.samples import Tied, Views, convolution, mlp

from zcinfer import skeleton
from zcinfer.errors import ModelCodeMissing, ModelError, SplitError
from zcinfer.parts import join, join_fake, split

# --- the copy and its buffer -----------------------------------------------------------------------------------------


def test_the_buffer_lives_as_long_as_any_tensor_of_the_copy() -> None:
    parts = split(mlp())
    buffer = buffer_of(parts)
    gone = weakref.ref(buffer)
    other = join(parts.skeleton, parts.description, buffer)
    view = other[0].weight[0]
    del buffer, other
    gc.collect()
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None


def test_small_tensors_and_buffers_can_be_had_as_copies() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(4000, affine=False), Views())
    parts = split(model)
    buffer = buffer_of(parts)
    other = join(parts.skeleton, parts.description, buffer, copy_small=True)
    assert_same(model, other)
    assert [name for name, tensor in named(other) if lies_in(buffer, tensor)] == ["0.weight"]


def test_a_copy_without_weights_has_the_same_structure() -> None:
    model = nn.Sequential(Views(), convolution(), Tied())
    model.handle = model.register_forward_hook(lambda module, args, output: output)
    parts = split(model)
    with torch._subclasses.FakeTensorMode():
        fake = join_fake(parts.skeleton, parts.description)
    for (name, tensor), (twin_name, twin) in zip(named(model), named(fake), strict=True):
        assert name == twin_name
        assert (twin.shape, twin.dtype, twin.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        assert isinstance(twin, nn.Parameter) == isinstance(tensor, nn.Parameter)


# --- the description -------------------------------------------------------------------------------------------------


def test_submodules_in_train_mode_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    model[1].train()
    assert split(model).description.training == ("1",)
    assert split(model.train()).description.training == ("", "0", "1")


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (nn.Linear(2, 2), "float32"),
        (nn.Linear(2, 2).bfloat16(), "bfloat16"),
        (nn.ReLU(), ""),
        (nn.BatchNorm1d(2, False), "float32"),
    ],
)
def test_the_floating_dtype_is_told(model: nn.Module, dtype: str) -> None:
    assert split(model).description.dtype == dtype


def test_the_class_is_named_in_full() -> None:
    assert split(nn.Linear(2, 2)).description.class_name == "torch.nn.modules.linear.Linear"


def test_storages_go_by_the_names_of_their_tensors() -> None:
    names = [storage.name for storage in split(nn.Sequential(Tied(), convolution())).description.storages]
    assert "0.embedding.weight" in names
    assert "1.1.running_mean" in names
    assert len(set(names)) == len(names)


# --- what is refused -------------------------------------------------------------------------------------------------


class Holder:
    def __init__(self, inner: Any):
        self.inner = inner


@pytest.fixture
def closing() -> Iterator[list[Any]]:
    """Things to close after the test."""
    opened: list[Any] = []
    yield opened
    for thing in opened:
        thing.close()


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "lock": (threading.Lock, "lock"),
    "generator": (lambda: (i for i in range(3)), "generator"),
    "text file, read": (lambda: open(__file__), "TextIOWrapper"),  # noqa: SIM115
    "text file, written": (lambda: tempfile.TemporaryFile("w"), "not opened for reading"),  # noqa: SIM115
    "binary file": (lambda: open(__file__, "rb"), "BufferedReader"),  # noqa: SIM115
    "socket": (socket.socket, "socket"),
    "weak reference": (lambda: weakref.ref(Holder), "weakref"),
    "frame": (sys._getframe, "frame"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_pickled_is_named_with_its_reason(case: str, closing: list[Any]) -> None:
    make, reason = BAD[case]
    model = mlp()
    model[2].bad = make()
    if hasattr(model[2].bad, "fileno"):
        closing.append(model[2].bad)
    before = state_of(model)
    with pytest.raises(SplitError, match=rf"Sequential\.2\.bad .*{reason}"):
        split(model)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda bad: {"key": [1, bad]}, "bad['key'][1]"),
        (lambda bad: (bad,), "bad[0]"),
        (lambda bad: Holder({"a": Holder(bad)}), "bad.inner['a'].inner"),
        (lambda bad: collections.OrderedDict(x=bad), "bad['x']"),
    ],
    ids=["lists in dicts", "tuple", "objects", "ordered dict"],
)
@pytest.mark.parametrize("make", [threading.Lock, lambda: open(__file__)], ids=["by pickle", "by us"])  # noqa: SIM115
def test_the_path_goes_down_to_the_culprit(
    make: Callable[[], Any], wrap: Callable[[Any], Any], path: str, closing: list[Any]
) -> None:
    bad = make()
    if isinstance(bad, io.IOBase):
        closing.append(bad)
    model = mlp()
    model[2].bad = wrap(bad)
    with pytest.raises(SplitError, match=re.escape(f"Sequential.2.{path} (a {type(bad).__name__})")):
        split(model)


@pytest.mark.parametrize("thing", [3, None, nn.Linear, {"weight": torch.ones(2)}, "bert"])
def test_only_modules_are_taken(thing: Any) -> None:
    with pytest.raises(SplitError, match=r"must be a torch\.nn\.Module"):
        split(thing)


def test_too_deep_a_model_is_refused_with_the_way_out() -> None:
    model: nn.Module = nn.ReLU()
    for _ in range(500):
        model = nn.Sequential(model)
    with pytest.raises(SplitError, match=r"too deeply.*setrecursionlimit"):
        split(model)


@pytest.mark.parametrize("fits", ["lambda", "views of dicts", "cached"])
def test_some_things_that_plain_pickle_refuses_are_taken(fits: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model.thing = {
        "lambda": lambda: 3,
        "views of dicts": model.keys(),
        "cached": functools.lru_cache(lambda: 3),
    }[fits]
    other = round_trip(model)
    assert other.thing() == 3 if callable(model.thing) else list(other.thing) == ["a"]


# --- code that is not there, or fails --------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module that other processes may not have; it is forgotten when the test asks for it."""
    (tmp_path / "zc_foreign.py").write_text(
        """
import torch
class Net(torch.nn.Linear):
    pass
class Fails(torch.nn.Linear):
    def __setstate__(self, state):
        raise KeyError("gone")
class Imports(torch.nn.Linear):
    def __setstate__(self, state):
        from json import no_such_name
class NoModule(torch.nn.Linear):
    def __reduce__(self):
        return dict, ()
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("zc_foreign")
    sys.modules.pop("zc_foreign", None)


def test_a_missing_package_is_named(foreign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = split(foreign.Net(2, 2))
    monkeypatch.delitem(sys.modules, "zc_foreign")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "zc_foreign.py").exists()])
    importlib.invalidate_caches()
    with pytest.raises(ModelCodeMissing, match=r"zc_foreign\.Net.*'zc_foreign' importable"):
        join(parts.skeleton, parts.description, buffer_of(parts))


def test_the_version_of_a_missing_class_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = split(nn.Linear(2, 2))
    monkeypatch.delattr("torch.nn.modules.linear.Linear")
    with pytest.raises(ModelCodeMissing, match=rf"install torch=={torch.__version__}".replace("+", r"\+")):
        join(parts.skeleton, parts.description, buffer_of(parts))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("Fails", ModelError, r"zc_foreign\.Fails.*KeyError: 'gone'"),
        ("Imports", ModelCodeMissing, "no_such_name"),
        ("NoModule", ModelError, "comes back as a dict"),
    ],
)
def test_a_model_whose_code_fails_is_named(foreign: Any, name: str, error: type[Exception], message: str) -> None:
    parts = split(getattr(foreign, name)(2, 2))
    with pytest.raises(error, match=message):
        join(parts.skeleton, parts.description, buffer_of(parts))


def test_a_module_of_another_torch_gets_the_attributes_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton, "_EXPECTED", frozenset())
    model = nn.Linear(2, 3)
    expected = set(vars(model))
    del vars(model)["_forward_hooks_with_kwargs"]
    parts = split(model)
    buffer = bytearray(b"".join(bytes(piece) for piece in parts.pieces()))
    assert vars(join(parts.skeleton, parts.description, buffer)).keys() < expected
    older = dataclasses.replace(parts.description, requires={"torch": "2.0.0"})
    assert vars(join(parts.skeleton, older, buffer)).keys() == expected
