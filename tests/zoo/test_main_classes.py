"""Classes that no other process can import: of scripts, of functions, with what they use; and cycles of references."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from zcinfer.parts import Parts, join, split
from zoo.compare import buffer_of, round_trip
from zoo.samples import Models, X, mlp


def of_a_local_class() -> nn.Module:
    factor = torch.randn(2)

    class Local(nn.Linear):
        offset = torch.randn(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * factor + self.offset

    return Local(4, 2)


def of_one_factory_twice() -> nn.Module:
    """Two classes of one name that do not do the same."""

    def make(scale: float) -> Any:
        class Layer(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) * scale

        return Layer(4, 4)

    return nn.Sequential(make(2.0), make(3.0), make(2.0))


def of_a_class_of_its_own_parts() -> nn.Module:
    """Classes that refer to one another, through bases, cells and attributes."""

    class Base(nn.Module):
        known: dict[str, Any] = {}  # noqa: RUF012
        constant = torch.randn(4)

    class Left(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Base.known["Right"].apply(x) + self.constant

    class Right(Base):
        @staticmethod
        def apply(x: torch.Tensor) -> torch.Tensor:
            return x * len(Base.known)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Left().forward(x) if x.numel() else x

    Base.known = {"Left": Left, "Right": Right}
    return nn.Sequential(Left(), Right())


def of_a_registry() -> nn.Module:
    """A class that its base keeps in a table by `__init_subclass__`, as registries of layers do."""

    class Base(nn.Module):
        registry: dict[str, Any] = {}  # noqa: RUF012

        def __init_subclass__(cls) -> None:
            Base.registry[cls.__name__] = cls

    class Layer(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    return Layer()


def parametrized_local_class() -> nn.Module:
    class Local(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.weight.sum()

    return parametrizations.weight_norm(Local(4, 4))


SCRIPT = """
import dataclasses, enum, functools
from typing import NamedTuple
import torch
from torch import nn

OFFSET = torch.arange(4.0)
SCALE = 2

class Kind(enum.Enum):
    ADD, MULTIPLY = "+", "*"

@dataclasses.dataclass(frozen=True)
class Settings:
    kind: Kind = Kind.ADD
    widths: tuple[int, ...] = (4, 4)

class State(NamedTuple):
    hidden: torch.Tensor
    steps: int

def activation(x):
    return torch.relu(x) * SCALE

def compose(*functions):
    return functools.reduce(lambda f, g: lambda x: g(f(x)), functions)

class Block(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        self.layer = nn.Linear(*settings.widths)
        self.after = compose(activation, lambda x: x + OFFSET)

    def forward(self, x):
        x = self.after(self.layer(x))
        return x + 1 if self.settings.kind is Kind.ADD else x * 2

class Recursive(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.block = Block(Settings(Kind.MULTIPLY if depth else Kind.ADD))
        self.inner = Recursive(depth - 1) if depth else None

    def forward(self, x):
        x = self.block(x)
        return self.inner(x) if self.inner is not None else x

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = Recursive(2)
        self.state = State(torch.randn(4), 3)
        self.kinds = {Kind.ADD: torch.randn(4), Kind.MULTIPLY: None}
        self.register_forward_hook(lambda module, args, output: output + module.state.hidden * module.state.steps)

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, x):
        return super(Model, self).extra_repr().__len__() + self.blocks(x.to(self.device)) + self.kinds[Kind.ADD]
"""


def of_a_script() -> nn.Module:
    """As a user's script builds it: its classes and functions are of `__main__`."""
    script: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(SCRIPT, "script.py", "exec"), script)
    model: nn.Module = script["Model"]()
    return model


def cyclic() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].neighbours = [model, model[1]]
    model[1].others = {model, model[0]}
    model.append(model[0])
    return model


class Node(nn.Module):
    """Knows its parent, not as a submodule."""

    def __init__(self, parent: Node | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "parent", parent)
        self.layer = nn.Linear(4, 4)
        self.child = Node(self) if parent is None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        return self.child(x) if self.child is not None else x + self.parent.layer.bias


def of_itself() -> nn.Module:
    model = mlp()
    model.me = model.forward
    model.table = {"model": model, "list": [model]}
    model.table["table"] = model.table
    model.function = lambda x: model[0](x)
    model[0].weight.owner = model[0]
    return model


class Weak(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.known = weakref.WeakSet([self.layer])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (layer,) = self.known
        return layer(x)


MODELS: Models = {
    "a local class": (of_a_local_class, (X,)),
    "two classes of one name": (of_one_factory_twice, (X,)),
    "a class in a registry": (of_a_registry, (X,)),
    "classes that know one another": (of_a_class_of_its_own_parts, (X,)),
    "a parametrized local class": (parametrized_local_class, (X,)),
    "classes of a script": (of_a_script, (X,)),
    "cycles": (cyclic, (X[:, :3],)),
    "a child that knows its parent": (Node, (X,)),
    "a model that holds itself": (of_itself, (X,)),
    "weak references": (Weak, (X,)),
}


def test_a_cycle_ends_in_the_copy() -> None:
    model = of_itself()
    copy = round_trip(model)
    assert copy.me.__self__ is copy
    assert copy.table["table"] is copy.table
    assert copy.table["list"][0] is copy
    assert copy.function.__closure__[0].cell_contents is copy
    assert copy[0].weight.owner is copy[0]
    node = round_trip(Node())
    assert node.child.parent is node


def loaded_elsewhere(make: Callable[[], nn.Module]) -> tuple[Any, Parts]:
    """A copy whose classes are new, as in another process, and what it was made of."""
    model: Any = make()
    parts = split(model)
    del model
    gc.collect()
    return join(parts.skeleton, parts.description, buffer_of(parts)), parts


@pytest.mark.parametrize("make", [of_a_local_class, of_a_registry, of_a_class_of_its_own_parts, of_a_script])
def test_a_class_that_was_made_anew_is_the_same_model(make: Callable[[], nn.Module]) -> None:
    copy, parts = loaded_elsewhere(make)
    assert split(copy).description.digest == parts.description.digest


def test_a_class_that_was_made_anew_has_its_whole_name() -> None:
    copy, _ = loaded_elsewhere(of_a_local_class)
    assert type(copy).__qualname__ == "of_a_local_class.<locals>.Local"


def test_a_registry_of_subclasses_has_the_class_of_the_copy() -> None:
    copy, _ = loaded_elsewhere(of_a_registry)
    (base,) = type(copy).__bases__
    assert base.registry == {"Layer": type(copy)}
    assert torch.equal(base.registry["Layer"]()(X), X * 2)


def test_a_registry_of_subclasses_is_left_as_it_is() -> None:
    model = of_a_registry()
    (base,) = type(model).__bases__
    copy = round_trip(model)
    assert base.registry == {"Layer": type(model)} == {"Layer": type(copy)}


def test_a_class_that_travels_is_one_class_however_often_it_is_met() -> None:
    copy = round_trip(of_one_factory_twice())
    assert len({type(layer) for layer in copy}) == 3
    blocks = round_trip(of_a_script()).blocks
    assert type(blocks) is type(blocks.inner) is type(blocks.inner.inner)
    assert type(blocks.block.settings.kind) is type(blocks.inner.block.settings.kind)
