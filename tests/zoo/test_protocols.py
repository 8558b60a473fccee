"""Modules with a say in how they are pickled, copied, compared, and written to."""

from __future__ import annotations

import abc
import copyreg
import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import nn

from zcinfer.parts import split
from zoo.compare import assert_same, round_trip, state_of
from zoo.samples import Models, X

T = TypeVar("T")


class Protocols(nn.Module):
    """A module with a say in its own pickling; its copies by `copy` would be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.lock = threading.Lock()
        self.history = ["made"]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a model is never copied")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def get_extra_state(self) -> Any:
        return {"extra": 1}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("no state is ever loaded")

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
        return super().named_parameters(prefix, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return self.layer(x)


class CopiesAreItself(nn.Module):
    """Whoever takes a deep copy apart takes the user's own model apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __copy__(self) -> Any:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Reduced(nn.Module):
    """Says by `__reduce__` what it is made from: arguments, then state."""

    def __init__(self, width: int, weight: torch.Tensor | None = None):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.randn(width, width) if weight is None else weight)

    def __reduce__(self) -> Any:
        return Reduced, (self.width, self.weight.detach()), {"training": self.training}

    def __setstate__(self, state: Any) -> None:
        self.train(state["training"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class ReducedByVersion(nn.Linear):
    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, state, *rest = super().__reduce_ex__(protocol)
        return function, arguments, state | {"protocol": "by version"}, *rest


class ByOneFunction(nn.Module):
    """Is pickled as a call of a function of this module."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    def __reduce__(self) -> Any:
        return ByOneFunction, (self.weight,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Halved(nn.Linear):
    """Its state is half as long as its weight, which is symmetric."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.weight = nn.Parameter(self.weight.detach() + self.weight.detach().t())

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() if hasattr(super(), "__getstate__") else vars(self)
        state = dict(state)
        state["_parameters"] = {}
        state["upper"] = self.weight.detach().triu()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        upper = state.pop("upper")
        super().__setstate__(state)
        self._parameters = {}
        self.register_parameter("weight", nn.Parameter(upper + upper.triu(1).t()))
        self.register_parameter("bias", None)


class Frozen(nn.Module):
    """Nothing may be set on it once it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.names = ("a", "b")
        self.done = True

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("done"):
            raise AttributeError(f"{name} cannot be set")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} cannot be deleted")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Wrapper(nn.Module):
    """Passes on to what it wraps whatever it has not itself."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = nn.Linear(4, 3)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wrapped(x) * self.in_features


class Equal(nn.Linear):
    """All of them are equal, empty and false."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    def __hash__(self) -> int:
        return 3

    def __bool__(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0


class NewArguments(nn.Module):
    """Cannot be made without arguments."""

    def __new__(cls, width: int, *, name: str) -> Any:
        module = super().__new__(cls)
        object.__setattr__(module, "made_for", (width, name))
        return module

    def __init__(self, width: int, *, name: str):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.name = name

    def __getnewargs_ex__(self) -> Any:
        return (self.layer.in_features,), {"name": self.name}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * len(self.made_for)


class Slotted(nn.Module):
    __slots__ = ("outside",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        object.__setattr__(self, "outside", torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.outside


class Base(nn.Module, abc.ABC, Generic[T]):
    made: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__()
        cls.made = [*cls.made, cls.__name__, *settings]

    @abc.abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...

    @property
    def doubled(self) -> torch.Tensor:
        return self.weight * 2

    @doubled.setter
    def doubled(self, value: torch.Tensor) -> None:
        raise AssertionError("no property is ever set")


class Derived(Base[int], setting=1):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.doubled * len(self.made)


class Extra(nn.Linear):
    """State that is no tensor, and a tensor that is state only."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.vocabulary, self.scale = {"a": 1}, torch.randn(4)

    def get_extra_state(self) -> Any:
        return {"vocabulary": self.vocabulary, "scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.vocabulary, self.scale = state["vocabulary"], state["scale"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale * len(self.vocabulary)


class Registered(nn.Linear):
    pass


def _registered(layer: Registered) -> Any:
    state = {name: value for name, value in vars(layer).items() if name != "forgotten"}
    return _make_registered, (), state | {"by": "copyreg"}


def _make_registered() -> Registered:
    return Registered.__new__(Registered)


copyreg.pickle(Registered, _registered)


def marked_for_copyreg() -> nn.Module:
    layer = Registered(4, 4)
    layer.by = "copyreg"
    return layer


def with_its_protocol() -> nn.Module:
    layer = ReducedByVersion(4, 4)
    layer.protocol = "by version"
    return layer


MODELS: Models = {
    "its own protocols": (Protocols, (X[:, :3],)),
    "deep copies that are the model": (CopiesAreItself, (X,)),
    "made by __reduce__": (lambda: Reduced(4).eval(), (X,)),
    "made by __reduce_ex__": (with_its_protocol, (X,)),
    "made by a call": (lambda: ByOneFunction(torch.randn(4, 3)), (X,)),
    "half of its state": (Halved, (X,)),
    "nothing can be set": (Frozen, (X,)),
    "attributes of what it wraps": (Wrapper, (X,)),
    "all are equal and false": (lambda: nn.Sequential(Equal(4, 4), Equal(4, 4)), (X,)),
    "arguments of __new__": (lambda: NewArguments(4, name="width"), (X,)),
    "an abstract base": (Derived, (X,)),
    "extra state": (Extra, (X,)),
    "registered with copyreg": (marked_for_copyreg, (X,)),
}


def test_a_model_whose_copies_are_itself_keeps_its_weights() -> None:
    model = CopiesAreItself()
    before, expected = state_of(model), model(X)
    copy = round_trip(model)
    assert state_of(model) == before
    assert copy.layer.weight is not model.layer.weight
    assert torch.equal(model(X), expected)
    assert torch.equal(copy(X), expected)


def test_slots_of_a_module_come_back_or_are_refused() -> None:
    model = Slotted()
    assert torch.equal(round_trip(model)(X), model(X))


def test_a_copy_keeps_the_say_of_its_class() -> None:
    copy = round_trip(Frozen())
    with pytest.raises(AttributeError, match="names cannot be set"):
        copy.names = ()
    assert copy.names == ("a", "b")
    assert round_trip(Protocols()).lock.acquire(blocking=False)
    assert round_trip(NewArguments(4, name="n")).made_for == (4, "n")


def test_extra_state_goes_into_the_state_of_the_copy() -> None:
    model = Extra()
    copy = round_trip(model)
    assert copy.state_dict()["_extra_state"]["vocabulary"] == {"a": 1}
    fresh = Extra()
    fresh.load_state_dict(copy.state_dict())
    assert_same(model, fresh)


def test_only_what_a_state_holds_is_stored() -> None:
    (table,) = [tensor.size for tensor in split(Halved()).description.tensors]
    assert table == (4, 4)
