"""Digests: equal exactly where the content is, in this process and in others."""

from __future__ import annotations

import collections
import copyreg
import dataclasses
import enum
import functools
import importlib
import json
import os
import struct
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from zcinfer.errors import SplitError
from zcinfer.parts import join, split


def digest(model: nn.Module) -> str:
    return split(model).description.digest


def holding(*values: Any) -> nn.Module:
    """A module with these attributes."""
    module = nn.Module()
    for number, value in enumerate(values):
        setattr(module, f"value{number}", value)
    return module


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 3)


def as_main(source: str, name: str = "Model") -> Any:
    """What ``name`` is in a script with that source: its classes and functions travel by value."""
    script = {"__name__": "__main__"}
    exec(compile(source, "script.py", "exec"), script)
    found: Any = script[name]
    return found() if isinstance(found, type) else found


class Colour(enum.Enum):
    RED = 1
    GREEN = 2


@dataclasses.dataclass
class Settings:
    width: int
    names: frozenset[str] = frozenset()


class Record(dict[str, int]):
    unit = ""


class Row(list[int]):
    unit = ""


class Tags(set[str]):
    pass


def with_unit(value: Any, unit: str) -> Any:
    value.unit = unit
    return value


def add(a: int, b: int) -> int:
    return a + b


def append_of(item: int) -> Any:
    return [item].append


NAN, OTHER_NAN = (struct.unpack("<d", struct.pack("<Q", bits))[0] for bits in (0x7FF8000000000000, 0x7FF8000000000001))

DIFFERENT = {
    "zero and minus zero": (0.0, -0.0),
    "nan and another nan": (NAN, OTHER_NAN),
    "imaginary zero and minus zero": (complex(0, 0.0), complex(0, -0.0)),
    "int and bool": (1, True),
    "int and float": (1, 1.0),
    "none and false": (None, False),
    "text and bytes": ("1", b"1"),
    "bytes and bytearray": (b"1", bytearray(b"1")),
    "large ints": (2**64, 2**64 + 1),
    "tuple and list": ((1,), [1]),
    "size and tuple": (torch.Size([1]), (1,)),
    "set and frozenset": ({1}, frozenset({1})),
    "set and list of its items": ({1}, [1]),
    "nesting": ([[1], 2], [1, [2]]),
    "empties": ([], ()),
    "items in one list or another": ([["a"], ["b", "c"]], [["a", "b"], ["c"]]),
    "order of a list": ([1, 2], [2, 1]),
    "order of a dict": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "key and value": ({"a": "b"}, {"b": "a"}),
    "kinds of dict": ({"a": 1}, collections.OrderedDict(a=1)),
    "default of a dict": (collections.defaultdict(int), collections.defaultdict(list)),
    "state of a dict subclass": (with_unit(Record(a=1), "m"), with_unit(Record(a=1), "s")),
    "content of a dict subclass": (Record(a=1), Record(a=2)),
    "state of a list subclass": (with_unit(Row([1]), "m"), with_unit(Row([1]), "s")),
    "content of a set subclass": (Tags({"a"}), Tags({"b"})),
    "subclass and class": (Row([1]), [1]),
    "length of a deque": (collections.deque([1], 2), collections.deque([1], 3)),
    "partial's arguments": (functools.partial(add, 1), functools.partial(add, 2)),
    "partial's keywords": (functools.partial(add, a=1), functools.partial(add, b=1)),
    "partial's function": (functools.partial(add), functools.partial(max)),
    "methods of equal kind": (linear(0).forward, linear(1).forward),
    "methods of one object": (linear(0).forward, linear(0).extra_repr),
    "built-in methods": (append_of(1), append_of(2)),
    "built-in functions": (max, min),
    "torch functions": (torch.relu, torch.abs),
    "array's values": (np.array([1, 2]), np.array([1, 3])),
    "array's dtype": (np.array([1, 2], "i4"), np.array([1, 2], "u4")),
    "array's byte order": (np.array([1, 2], "<i4"), np.array([1, 2], ">i4")),
    "array's shape": (np.zeros((2, 3)), np.zeros((3, 2))),
    "array's zeros": (np.array([0.0]), np.array([-0.0])),
    "NumPy's float and Python's": (np.float64(1), 1.0),
    "NumPy's dtypes": (np.dtype("f4"), np.dtype("f8")),
    "fields of NumPy's dtypes": (np.dtype([("a", "f4")]), np.dtype([("b", "f4")])),
    "enum's members": (Colour.RED, Colour.GREEN),
    "dataclass's fields": (Settings(1), Settings(2)),
    "namedtuple and tuple": (collections.namedtuple("Pair", "a b")(1, 2), (1, 2)),
    "torch's dtypes": (torch.float32, torch.float64),
    "dtype and text": (torch.float32, "torch.float32"),
    "devices": (torch.device("cpu"), torch.device("meta")),
    "slices": (slice(1, 2), slice(2, 1)),
    "classes": (int, float),
    "class and instance": (dict, {}),
    "code": (lambda x: x + 1, lambda x: x + 2),
    "minus zero in code": (lambda x: x * 0.0, lambda x: x * -0.0),
    "int or bool in code": (lambda: 1, lambda: True),
    "sets in code": (lambda x: x in {1, 2}, lambda x: x in {1, 3}),
    "defaults": (lambda x=1: x, lambda x=2: x),
    "keyword defaults": (lambda *, x=1: x, lambda *, x=2: x),
    "position only": (lambda x: x, lambda x, /: x),
    "keyword only": (lambda x, y=None: x, lambda x, *, y=None: x),
    "generators and lists": (lambda x: [y for y in x], lambda x: (y for y in x)),  # noqa: C416
    "views of dicts": ({"a": 1}.keys(), {"b": 1}.keys()),
    "weak sets": (weakref.WeakSet([Colour.RED]), weakref.WeakSet([Colour.GREEN])),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_other_attributes_give_another_digest(case: str) -> None:
    one, other = DIFFERENT[case]
    assert digest(holding(one)) != digest(holding(other))


@pytest.mark.parametrize("case", DIFFERENT)
def test_any_attribute_keeps_its_digest_when_joined(case: str) -> None:
    for value in DIFFERENT[case]:
        if not isinstance(value, weakref.WeakSet):  # nobody else holds what it holds
            parts = split(holding(value))
            copy = join(parts.skeleton, parts.description, bytearray(b"".join(parts.pieces())))
            assert digest(copy) == parts.description.digest


def two_lists() -> nn.Module:
    return holding([1], [1])


def one_list_twice() -> nn.Module:
    shared = [1]
    return holding(shared, shared)


def two_byte_arrays() -> nn.Module:
    return holding(bytearray(b"a"), bytearray(b"a"))


def one_byte_array_twice() -> nn.Module:
    shared = bytearray(b"a")
    return holding(shared, shared)


def tied(tie: bool) -> nn.Module:
    model = nn.Sequential(linear(), linear())
    if tie:
        model[1].weight = model[0].weight
    return model


def tied_in_a_set(tie: bool) -> nn.Module:
    model = holding(linear())
    model.chosen = {model.value0.weight if tie else nn.Parameter(model.value0.weight.detach().clone())}
    return model


def sliced(same_storage: bool) -> nn.Module:
    base = torch.arange(4.0)
    return holding(base[:2], base[2:]) if same_storage else holding(base[:2].clone(), base[2:].clone())


def changed(change: Callable[[nn.Linear], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = linear()
        change(model)
        return model

    return build


def flip_a_bit(model: nn.Linear) -> None:
    model.weight.data.view(torch.int32)[0, 0] ^= 1


def buffer(persistent: bool) -> nn.Module:
    model = nn.Module()
    model.register_buffer("b", torch.ones(2), persistent=persistent)
    return model


def negate_zero(model: nn.Linear) -> None:
    model.bias.data.fill_(-0.0)


def hooked(*hooks: Callable[..., Any]) -> nn.Module:
    model = linear()
    for hook in hooks:
        model.register_forward_hook(hook)
    return model


def first_hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + 1


def second_hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


OTHER_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "a bit of a weight": (linear, changed(flip_a_bit)),
    "the sign of a zero": (changed(lambda m: m.bias.data.zero_()), changed(negate_zero)),
    "two tensors that change roles": (
        lambda: holding(torch.zeros(2), torch.ones(2)),
        lambda: holding(torch.ones(2), torch.zeros(2)),
    ),
    "a tie": (lambda: tied(True), lambda: tied(False)),
    "a tie through a set": (lambda: tied_in_a_set(True), lambda: tied_in_a_set(False)),
    "views of one storage": (lambda: sliced(True), lambda: sliced(False)),
    "a shape": (lambda: holding(torch.zeros(2, 3)), lambda: holding(torch.zeros(3, 2))),
    "strides": (lambda: holding(torch.zeros(3, 3)), lambda: holding(torch.zeros(3, 3).t())),
    "an offset": (lambda: holding(torch.zeros(4)[:2]), lambda: holding(torch.zeros(4)[2:])),
    "a dtype of equal bytes": (
        lambda: holding(torch.zeros(2, dtype=torch.float16)),
        lambda: holding(torch.zeros(2, dtype=torch.bfloat16)),
    ),
    "a dtype": (linear, changed(lambda m: m.double())),
    "an empty tensor's shape": (lambda: holding(torch.zeros(0, 2)), lambda: holding(torch.zeros(0, 3))),
    "requires_grad": (linear, changed(lambda m: m.weight.requires_grad_(False))),
    "a parameter or a tensor": (
        lambda: holding(nn.Parameter(torch.zeros(2), False)),
        lambda: holding(torch.zeros(2)),
    ),
    "a persistent buffer": (lambda: buffer(True), lambda: buffer(False)),
    "a tensor's attribute": (linear, changed(lambda m: setattr(m.weight, "unit", "m"))),
    "eval mode": (linear, changed(lambda m: m.eval())),
    "an attribute": (linear, changed(lambda m: setattr(m, "unit", "m"))),
    "a shared list": (two_lists, one_list_twice),
    "a shared byte array": (two_byte_arrays, one_byte_array_twice),
    "a hook": (hooked, lambda: hooked(first_hook)),
    "a hook's function": (lambda: hooked(second_hook), lambda: hooked(first_hook)),
    "the order of hooks": (lambda: hooked(first_hook, second_hook), lambda: hooked(second_hook, first_hook)),
    "a parametrization": (linear, lambda: parametrizations.weight_norm(linear())),
    "a parametrization's setting": (
        lambda: parametrizations.weight_norm(linear(), dim=0),
        lambda: parametrizations.weight_norm(linear(), dim=1),
    ),
    "a submodule's name": (lambda: nn.ModuleDict({"a": linear()}), lambda: nn.ModuleDict({"b": linear()})),
    "a sparse tensor's values": (
        lambda: holding(torch.eye(2).to_sparse()),
        lambda: holding((2 * torch.eye(2)).to_sparse()),
    ),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_another_model_gives_another_digest(case: str) -> None:
    one, other = OTHER_MODELS[case]
    assert digest(one()) != digest(other())


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_the_same_model_built_again_gives_the_same_digest(case: str) -> None:
    for build in OTHER_MODELS[case]:
        assert digest(build()) == digest(build())


def set_of(*items: str) -> set[str]:
    found: set[str] = set()
    for item in items:
        found.add(item)
    return found


def modules_in_a_cycle_of_sets() -> nn.Module:
    model = nn.Sequential(*(linear(seed) for seed in range(12)))
    for layer in model:
        layer.others = {model, *model, layer.bias} - {layer}
    return model


class Node:
    """Hashable by identity, and so in another order in every process."""

    def __init__(self, name: str):
        self.name = name
        self.others: set[Node] = set()


def nodes(*names: str) -> nn.Module:
    found = [Node(name) for name in names]
    for node in found:
        node.others = set(found) - {node}
    return holding(set(found))


def list_within_itself() -> nn.Module:
    loop: list[Any] = [1]
    loop.append(loop)
    return holding(loop)


def model_within_its_own_list() -> nn.Module:
    model = linear()
    model.known = [model, {"self": model}]
    return model


def equal_tuples(shared: bool) -> nn.Module:
    values = [json.loads("[1, [2]]") for _ in range(2)]
    first, second = ((value[0], tuple(value[1])) for value in values)
    return holding(first[1], first[1] if shared else second[1], (1, 2), tuple([1, 2]))  # noqa: C409


def handle_of_a_hook() -> nn.Module:
    model = linear()
    model.handle = model.register_forward_hook(first_hook, with_kwargs=True)
    return model


SAME: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "order of a set": (
        lambda: holding(set_of(*"abcdefgh", *map(str, range(64)))),
        lambda: holding(set_of(*map(str, reversed(range(64))), *reversed("abcdefgh"))),
    ),
    "cycles of sets": (modules_in_a_cycle_of_sets, modules_in_a_cycle_of_sets),
    "cycles of sets of objects": (lambda: nodes("a", "b", "c"), lambda: nodes("c", "a", "b")),
    "cycles of lists": (list_within_itself, list_within_itself),
    "cycles through the model": (model_within_its_own_list, model_within_its_own_list),
    "equal tuples, one object or two": (lambda: equal_tuples(True), lambda: equal_tuples(False)),
    "handles of hooks": (handle_of_a_hook, handle_of_a_hook),
    "gradients": (linear, changed(lambda m: m(torch.ones(3)).sum().backward())),
    "mode there and back": (linear, changed(lambda m: m.eval().train())),
    "weights loaded again": (linear, changed(lambda m: m.load_state_dict(linear().state_dict()))),
    "a slice and the same slice": (lambda: holding(slice(1, 2)), lambda: holding(slice(1, 2))),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_content_gives_the_same_digest(case: str) -> None:
    one, other = SAME[case]
    assert digest(one()) == digest(other())


def test_objects_that_all_know_one_another_through_sets_are_refused_in_time() -> None:
    with pytest.raises(SplitError, match="sets of Node within sets"):
        split(nodes(*map(str, range(50))))


SCRIPT = """
import abc, enum, functools, torch
FACTOR = 2
class Settings:
    limits = {"low", "high"}
class Base(torch.nn.Module):
    size = 3
    def helper(self, x): return x
def decorate(function):
    @functools.wraps(function)
    def call(*args): return function(*args)
    return call
def scale(x): return x * FACTOR
scale.unit = "m"
class Model(Base):
    @property
    def name(self): return "model"
    @staticmethod
    def shared(x): return x
    @decorate
    def decorated(self, x): return x + 1
    @torch.no_grad()
    def forward(self, x):
        return scale(x) if Settings.limits else scale.unit
    def lazily(self):
        return [FACTOR for _ in range(3)]
"""

EDITS = {
    "a constant that a used function uses": ("FACTOR = 2", "FACTOR = 3"),
    "a class that forward uses": ('{"low", "high"}', '{"low"}'),
    "a base's attribute": ("size = 3", "size = 4"),
    "a base's method": ("def helper(self, x): return x", "def helper(self, x): return -x"),
    "a base": ("class Base(torch.nn.Module)", "class Base(torch.nn.Sequential)"),
    "a metaclass": ("class Settings:", "class Settings(metaclass=abc.ABCMeta):"),
    "a decorated method": ("return x + 1", "return x + 2"),
    "a method in torch's own decorator": ("else scale.unit", "else scale.other"),
    "a decorator": ("return function(*args)", "return function(*args, None)"),
    "a decoration": ("@torch.no_grad()", "@torch.enable_grad()"),
    "a property": ('return "model"', 'return "other"'),
    "a static method made a class method": ("@staticmethod", "@classmethod"),
    "a static method made a plain one": ("    @staticmethod\n", ""),
    "a function's attribute": ('scale.unit = "m"', 'scale.unit = "s"'),
    "a new method": ("    def lazily", "    def extra(self): pass\n    def lazily"),
    "a method's name": ("def lazily", "def eagerly"),
    "a default": ("def shared(x)", "def shared(x=1)"),
    "code within code": ("range(3)", "range(4)"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_script_gives_another_digest(edit: str) -> None:
    before, after = EDITS[edit]
    assert SCRIPT.count(before) == 1
    assert digest(as_main(SCRIPT)) != digest(as_main(SCRIPT.replace(before, after)))


@pytest.mark.parametrize(
    "added",
    [
        pytest.param("\n\n\n# moved down\n", id="lines and comments"),
        pytest.param("unused = 3\n", id="a global that nobody uses"),
        # `forward` uses names.unit and args, but as attribute and argument
        pytest.param("unit = __import__('threading').Lock()\nargs = [1]\n", id="a global named as an attribute"),
    ],
)
def test_what_a_model_does_not_use_does_not_count(added: str) -> None:
    assert digest(as_main(added + SCRIPT)) == digest(as_main(SCRIPT))


def test_classes_of_a_script_are_told_apart_by_name() -> None:
    assert digest(as_main(SCRIPT)) != digest(as_main(SCRIPT.replace("Model(", "Other("), "Other"))


ENUM = """
import enum, torch
class Colour(enum.Enum):
    RED = "r"
    GREEN = "g"
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.colour = Colour.RED
"""


def test_a_reducer_registered_late_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(copyreg.dispatch_table, Node, lambda node: (Node, (node.name,)))
    one, other = Node("a"), Node("a")
    other.others.add(one)
    assert digest(holding(one)) == digest(holding(other))


def test_an_enum_of_a_script_counts_with_all_its_members() -> None:
    assert digest(as_main(ENUM)) == digest(as_main(ENUM))
    assert digest(as_main(ENUM)) != digest(as_main(ENUM.replace('GREEN = "g"', 'GREEN = "h"')))


CACHED = """
import functools, torch
@functools.lru_cache(maxsize=10)
def table(n): return n + 1
class Model(torch.nn.Module):
    @functools.lru_cache
    def cached(self, n): return table(n) + 10
    @functools.cached_property
    def lazy(self): return 100
"""


@pytest.mark.parametrize("edit", [("n + 1\n", "n + 2\n"), ("+ 10\n", "+ 20\n"), ("100", "200"), ("=10", "=20")])
def test_what_a_cache_wraps_counts(edit: tuple[str, str]) -> None:
    assert digest(as_main(CACHED)) == digest(as_main(CACHED))
    assert digest(as_main(CACHED)) != digest(as_main(CACHED.replace(*edit)))


def test_caches_of_a_script_travel() -> None:
    parts = split(as_main(CACHED))
    copy: Any = join(parts.skeleton, parts.description, bytearray(b"".join(parts.pieces())))
    assert (copy.cached(1), copy.lazy, copy.lazy) == (12, 100, 100)


MODULE = """
import functools, torch
def plain_decorator(function):
    return lambda *args: function(*args)
class Model(torch.nn.Module):
    def forward(self, x, scale=1.0): return x * scale
    @torch.no_grad()
    def decorated(self, x): return x + 1
    @plain_decorator
    def closed_over(self, x): return x + 10
    @functools.cached_property
    def lazy(self): return 100
    @functools.lru_cache
    def cached(self): return 1000
    @property
    def one(self): return 5
    @staticmethod
    def shared(x): return x
"""

MODULE_EDITS = {
    "code": ("x * scale", "x / scale"),
    "a default": ("scale=1.0", "scale=2.0"),
    "decorated code": ("return x + 1\n", "return x + 2\n"),
    "code in a closure": ("x + 10\n", "x + 20\n"),
    "a cached property": ("return 100\n", "return 200\n"),
    "a cached method": ("return 1000\n", "return 2000\n"),
    "a property": ("return 5", "return 6"),
    "the kind of a method": ("@staticmethod", "@classmethod"),
}


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], types.ModuleType]]:
    """Imports a module of one and the same name with a given source."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(source: str) -> types.ModuleType:
        (tmp_path / "zc_test_model.py").write_text(source)
        sys.modules.pop("zc_test_model", None)
        importlib.invalidate_caches()
        return importlib.import_module("zc_test_model")

    yield load
    sys.modules.pop("zc_test_model", None)


@pytest.mark.parametrize("edit", MODULE_EDITS)
def test_an_edited_module_gives_another_digest(edit: str, importable: Callable[[str], types.ModuleType]) -> None:
    before, after = MODULE_EDITS[edit]
    assert MODULE.count(before) == 1
    original = digest(importable(MODULE).Model())
    assert original == digest(importable("# moved down\n" + MODULE).Model())
    assert original != digest(importable(MODULE.replace(before, after)).Model())


def test_a_module_pickled_by_value_counts_with_its_globals(importable: Callable[[str], types.ModuleType]) -> None:
    import cloudpickle

    source = "import torch\nK = 1\nclass Model(torch.nn.Module):\n    def forward(self, x): return x * K\n"

    def by_value(source: str) -> str:
        module = importable(source)
        cloudpickle.register_pickle_by_value(module)
        try:
            return digest(module.Model())
        finally:
            cloudpickle.unregister_pickle_by_value(module)

    assert by_value(source) == by_value(source)
    assert by_value(source) != by_value(source.replace("K = 1", "K = 2"))


def test_requires_names_what_is_imported_and_not_what_travels(importable: Callable[[str], types.ModuleType]) -> None:
    assert set(split(importable(MODULE).Model()).description.requires) == {"torch", "zc_test_model"}
    assert set(split(as_main(SCRIPT)).description.requires) == {"torch"}


PUBLISH = """
import abc, collections, dataclasses, enum, functools, json, logging, sys, weakref
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar
import numpy as np, torch
from torch import nn
from zcinfer.archive import write_archive
from zcinfer.parts import split

FACTOR = 3
NAMES = {"x", "y", "zed", "alpha", "beta"}
logger = logging.getLogger("a.b")
T = TypeVar("T")

class Colour(enum.Enum):
    RED, GREEN = "r", "g"
class Flags(enum.Flag):
    A, B = 1, 2
@dataclasses.dataclass
class Settings:
    width: int = 3
    names: frozenset = frozenset({"p", "q", "r"})
    extra: list = dataclasses.field(default_factory=list)
@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    a: int = 1
class Point(NamedTuple):
    x: int
class Base(abc.ABC):
    @abc.abstractmethod
    def f(self): ...
class Implementation(Base, Generic[T]):
    kinds = {"u", "v", "w"}
    def f(self): return NAMES
class Tags(set): pass
class Record(dict): pass
class Meta(type): pass
class WithMeta(metaclass=Meta): pass

def helper(x): return x * FACTOR if x in {"a", "b", "c"} else logger
def closure(k):
    def inner(x): return helper(x) + k
    return inner

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.strings = {"one", "two", "three", 1, 2.5, None, ("t", 2), frozenset({"i", "j"})}
        self.modules_of_interest = {self, self.layer}
        self.weak = weakref.WeakSet([self.layer, self])
        self.table = {"k": [1, 2], "l": {"m", "n"}}
        self.f = closure(5)
        self.partial = functools.partial(helper, x=3)
        self.unnamed = lambda x: [y for y in x if y in NAMES]
        self.bound = self.method
        self.values = Colour.RED, Flags.A | Flags.B, Settings(), Slotted(), Point(1), Implementation(), WithMeta()
        self.subclasses = Tags(NAMES), Record(a=1)
        self.arrays = np.arange(6)[::2], np.float32(2), np.dtype("f4"), np.zeros(2, "f4")
        self.layer.register_forward_hook(closure(7))
    def method(self): return 1
    def forward(self, x): return self.layer(x) * FACTOR

torch.manual_seed(0)
models = {
    "main": Model(),
    "installed": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
}
parts = {name: split(model) for name, model in models.items()}
print(json.dumps({name: p.description.digest for name, p in parts.items()}))
for name, p in parts.items():
    write_archive(p, Path(sys.argv[1]) / name)
"""

JOIN = """
import json, sys
from pathlib import Path
from zcinfer.archive import Archive
from zcinfer.parts import join, split

def again(directory):
    archive = Archive(directory)
    return split(join(archive.skeleton(), archive.description, archive.weights())).description.digest

print(json.dumps({path.name: again(path) for path in Path(sys.argv[1]).iterdir()}))
"""


def start(source: str, path: Path, seed: int, *arguments: Path) -> subprocess.Popen[str]:
    path.write_text(source)
    command = [sys.executable, "-W", "error", str(path), *map(str, arguments)]
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def output_of(process: subprocess.Popen[str]) -> Any:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(output)


def test_fresh_processes_agree(tmp_path: Path) -> None:
    processes = [start(PUBLISH, tmp_path / f"publish{seed}.py", seed, tmp_path / str(seed)) for seed in (1, 2, 3)]
    first, second, third = map(output_of, processes)
    assert first == second == third
    assert len(set(first.values())) == 3
    # Nor does it matter who publishes: here one that has the models from an archive, and none of the script's classes.
    assert output_of(start(JOIN, tmp_path / "join.py", 4, tmp_path / "1")) == first
