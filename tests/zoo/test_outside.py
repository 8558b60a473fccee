"""Tensors where no registry of torch knows of them: attributes, containers, closures, partials, objects."""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from zcinfer.parts import split
from zoo.compare import round_trip
from zoo.samples import Models, X


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass
class Box:
    tensor: torch.Tensor


class Outside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        captured, in_partial = torch.randn(3), torch.randn(3)
        self.layer = nn.Linear(3, 3)
        self.plain = torch.randn(3)
        self.listed = [torch.randn(3), (torch.randn(3), {"deep": torch.randn(3)})]
        self.table = {"a": torch.randn(3), self: 1}
        self.pair = Pair(self.plain, torch.randn(3))
        self.box = Box(self.layer.weight)
        self.storage = torch.randn(3).untyped_storage()
        self.array = np.arange(3.0)
        self.function = lambda x: x + captured
        self.partial = functools.partial(torch.add, in_partial)
        self.bound = self.plain.add
        self.layer.register_forward_hook(lambda module, args, output: output * captured)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bound(self.partial(self.function(self.layer(x))))
        for tensor in (self.plain, self.listed[0], self.listed[1][0], self.listed[1][1]["deep"], self.table["a"]):
            x = x + tensor
        return x + self.pair.left + self.pair.right + self.box.tensor.sum() + float(self.array.sum())


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    tensor: torch.Tensor


class WithSlots:
    __slots__ = ("__dict__", "tensor")

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.other = tensor, tensor[0]


class Row(list[Any]):
    pass


class Record(dict[str, Any]):
    pass


class Containers(nn.Module):
    """One tensor in containers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        t = torch.randn(4)
        row, record = Row([t]), Record(t=t)
        row.tensor = record.tensor = t  # type: ignore[attr-defined]
        self.dictionaries = [
            collections.OrderedDict(b=t, a=t),
            collections.defaultdict(list, {"a": [t]}),
            collections.ChainMap({"a": t}, {"b": t}),
            types.SimpleNamespace(t=t),
            types.MappingProxyType({"t": t}),
            record,
        ]
        self.sequences = [collections.deque([t], maxlen=3), row, (t, [t]), {1: {2: {3: t}}}]
        self.objects = [Slotted(t), WithSlots(t), Box(t), Pair(t, t), slice(t, None)]
        self.one = {t}
        self.by_tensor = {t: "value"}
        self.t = t

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (one,) = self.one
        (key,) = self.by_tensor
        return x + self.dictionaries[0]["b"] * self.dictionaries[3].t + self.sequences[0][0] + one + key


OFFSET = torch.arange(4.0)


def by_default(x: torch.Tensor, offset: torch.Tensor = OFFSET) -> torch.Tensor:
    return x + offset


class Functions(nn.Module):
    """Tensors that functions hold: in cells, defaults, attributes, partials, caches, methods of other objects."""

    def __init__(self) -> None:
        super().__init__()
        cell, deep, default, keyword = (torch.randn(4) for _ in range(4))

        def outer(x: torch.Tensor) -> torch.Tensor:
            return inner(x) * cell

        def inner(x: torch.Tensor) -> torch.Tensor:
            return x + deep if x.numel() else outer(x)  # each has the other in a cell

        def with_defaults(x: torch.Tensor, a: torch.Tensor = default, *, b: torch.Tensor = keyword) -> torch.Tensor:
            return x * a + b

        outer.tensor = torch.randn(4)  # type: ignore[attr-defined]
        self.functions = [outer, with_defaults, by_default, lambda x: x - cell]
        self.partials = [
            functools.partial(torch.mul, cell),
            functools.partial(functools.partial(torch.add, alpha=2), other=deep),
            functools.partial(with_defaults, b=cell),
        ]
        self.layer = nn.Linear(4, 4)
        self.methods = [self.layer.forward, cell.mul, Box(cell).__eq__, self.scaled]
        self.cached = functools.lru_cache(maxsize=2)(lambda number: cell * number)
        self.composed = functools.reduce(lambda f, g: lambda x: g(f(x)), self.partials)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for function in (*self.functions, *self.partials, *self.methods[:2], self.methods[3], self.composed):
            x = function(x)
        return x + self.cached(3) + self.functions[0].tensor


class Lazily(nn.Module):
    """What is worked out at the first use, before and after publishing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.use = self.table.sum()

    @functools.cached_property
    def table(self) -> torch.Tensor:
        return self.layer.weight.detach() * 2

    @functools.cached_property
    def other(self) -> torch.Tensor:
        return self.layer.weight.detach() * 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ self.table @ self.other


class Random(nn.Module):
    """Random numbers of its own: the copy goes on where the model was."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.python, self.numpy = random.Random(4), np.random.default_rng(5)
        torch.rand(3, generator=self.generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(x.shape, generator=self.generator)
        return x + noise + self.python.random() + float(self.numpy.random())


class Distribution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(4))
        self.normal = torch.distributions.Normal(self.mean, torch.ones(4))
        self.packed = nn.utils.rnn.pack_sequence([torch.randn(3), torch.randn(2)])
        self.device, self.dtype, self.size = torch.device("cpu"), torch.bfloat16, torch.Size([2, 3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normal.log_prob(x) + self.packed.data.sum() + self.normal.rsample()


class Arrays(nn.Module):
    """NumPy's arrays, small and large, and one of objects."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = np.arange(4.0, dtype=np.float32), np.linspace(0, 1, 5000, dtype=np.float32)
        self.frozen = np.arange(3000)
        self.frozen.flags.writeable = False
        self.objects = np.array([torch.randn(4), None], dtype=object)
        self.scalar = np.float32(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.from_numpy(self.small) + float(self.large.sum() + self.scalar) + self.objects[0]


MODELS: Models = {
    "tensors outside the registries": (Outside, (X[:, :3],)),
    "containers": (Containers, (X,)),
    "functions": (Functions, (X,)),
    "cached properties": (Lazily, (X,)),
    "random numbers of its own": (Random, (X,)),
    "a distribution": (Distribution, (X,)),
    "arrays": (Arrays, (X,)),
}


def test_tensors_outside_the_registries_keep_their_ties() -> None:
    other = round_trip(Outside())
    assert other.pair.left is other.plain
    assert other.bound.__self__ is other.plain
    assert other.box.tensor is other.layer.weight
    assert list(other.table) == ["a", other]
    (captured,) = (cell.cell_contents for cell in other.function.__closure__)
    (hook,) = other.layer._forward_hooks.values()
    assert hook.__closure__[0].cell_contents is captured


def test_one_tensor_in_many_containers_stays_one() -> None:
    copy = round_trip(Containers())
    held = [
        copy.dictionaries[0]["a"], copy.dictionaries[1]["a"][0], copy.dictionaries[2]["b"], copy.dictionaries[3].t,
        copy.dictionaries[4]["t"], copy.dictionaries[5]["t"], copy.dictionaries[5].tensor, copy.sequences[0][0],
        copy.sequences[1][0], copy.sequences[1].tensor, copy.sequences[2][1][0], copy.sequences[3][1][2][3],
        copy.objects[0].tensor, copy.objects[1].tensor, copy.objects[2].tensor, copy.objects[3].left,
        copy.objects[4].start, *copy.one, *copy.by_tensor,
    ]  # fmt: skip
    assert all(tensor is copy.t for tensor in held)
    assert copy.sequences[0].maxlen == 3


LARGE = torch.zeros(200, 200)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: LARGE, id="attribute"),
        pytest.param(lambda: [(LARGE,)], id="list"),
        pytest.param(lambda: {"a": {"b": LARGE}}, id="dict"),
        pytest.param(lambda: {LARGE}, id="set"),
        pytest.param(lambda: eval("lambda x: x + LARGE", {"LARGE": LARGE}), id="global of a lambda"),
        pytest.param(lambda: (lambda large: lambda x: x + large)(LARGE), id="closure"),
        pytest.param(lambda: eval("lambda x, large=LARGE: x + large", {"LARGE": LARGE}), id="default of a lambda"),
        pytest.param(lambda: functools.partial(torch.add, LARGE), id="partial"),
        pytest.param(lambda: functools.partial(torch.add, other=LARGE), id="keyword of a partial"),
        pytest.param(lambda: LARGE.add, id="method"),
        pytest.param(lambda: Box(LARGE), id="object"),
        pytest.param(lambda: Slotted(LARGE), id="object with slots"),
        pytest.param(lambda: LARGE.untyped_storage(), id="storage"),
        pytest.param(lambda: torch.ones(200, 200).to_sparse(), id="sparse"),
        pytest.param(lambda: torch.quantize_per_tensor(LARGE, 1.0, 0, torch.qint8), id="quantised"),
        pytest.param(lambda: LARGE.to(torch.complex64).conj(), id="conjugate"),
        pytest.param(lambda: LARGE[::2, ::2], id="strided"),
        pytest.param(lambda: nn.Buffer(LARGE), id="buffer with attributes"),
        pytest.param(lambda: np.zeros((200, 200), np.float32), id="array"),
        pytest.param(lambda: torch.distributions.Normal(LARGE, 1.0, validate_args=False), id="distribution"),
    ],
)
def test_no_tensor_stays_in_the_skeleton(make: Callable[[], Any]) -> None:
    model = nn.Module()
    model.value = make()
    parts = split(model)
    assert len(parts.skeleton) < 4096
    assert parts.description.nbytes >= 40_000
