"""Classes that travel by value, as those of `__main__` do: which class of this process stands for one of an archive.

In the program that put the model it is the program's own, as long as that is what it was when it was put. Everywhere
else, and when it was changed since, it is one made for models with these classes as they were, which a load may set
anew. So no load changes a class of the program, and two versions of a class do not become one. Not for functions:
each load makes its own.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from .bytecode import global_names, home_of, is_importable
from .canonical import Canonical

try:
    import cloudpickle
except ImportError:  # no class travels by value
    cloudpickle = None

_PROGRAM = uuid.uuid4().hex

# What is one in all of a process: a copy of the model has the same as the program's own classes have.
_SINGLE = (type, BuiltinFunctionType, ModuleType, Enum)


class Family:
    """The classes of one model that travel by value, as they were when it was put.

    Parameters
    ----------
    digest : str
        Of all that they are and refer to.
    program : str
        Where they are the program's own; empty where a copy of the model is not to have them.
    trackers : tuple of str
        cloudpickle's names of those that `digest` is of.
    holds : callable, optional
        Whether one of the classes refers to an object.
    """

    def __init__(
        self,
        digest: str,
        program: str,
        trackers: tuple[str, ...],
        holds: Callable[[Any], bool] = lambda _: False,
    ):
        self._digest, self._program, self._trackers = digest, program, trackers
        self.holds = holds

    def __reduce__(self) -> Any:
        return find_family, (self._digest, self._program, self._trackers)

    def key(self, tracker: str) -> str:
        """The name of a class, and of what it was."""
        return tracker if tracker.endswith(self._digest) else f"{tracker}.{self._digest}"

    def is_here(self) -> bool:
        """Whether this is the program that put the model, and its classes are what they were."""
        if self._program != _PROGRAM:
            return False
        classes = [_tracked(tracker) for tracker in self._trackers]
        try:
            return all(cls is not None for cls in classes) and _walk(classes).hexdigest() == self._digest
        except Exception:  # they have become something that could not be put
            return False


class Reading:
    """The classes that one load is given."""

    def __init__(self, own: bool):
        self._own = own
        self._kept: set[int] = set()  # ids of the program's own

    def find(self, make: Callable[..., type], arguments: tuple[Any, ...], tracker: str) -> type:
        """The class that cloudpickle is to make, unless it is there: the program's, of an earlier load, or of this one.

        (A base that keeps its subclasses has brought it along.) To make it again would call the ``__init_subclass__``
        of its bases again, with a class that is then thrown away.
        """
        own = _tracked(tracker) if self._own else None
        if own is not None:
            self._kept.add(id(own))
            return own
        known = _tracked(arguments[-2])
        return make(*arguments) if known is None else known

    def set_state(self, cls: type, state: Any) -> None:
        """Give a class its attributes, unless it is the program's own."""
        if id(cls) not in self._kept:
            cloudpickle.cloudpickle._class_setstate(cls, state)


class FakeReading(Reading):
    """The classes of a model without weights: their own, since the tensors that classes hold are fake too."""

    def __init__(self) -> None:
        super().__init__(own=False)
        self._made: dict[str, type] = {}

    def find(self, make: Callable[..., type], arguments: tuple[Any, ...], tracker: str) -> type:
        if tracker not in self._made:
            self._made[tracker] = make(*arguments[:-2], None, arguments[-1])
        return self._made[tracker]


def family_of(classes: Sequence[type], others: Iterable[Any], storages: Iterable[torch.UntypedStorage]) -> Family:
    """The family of a model with these classes, and with these objects and storages besides.

    A model that has things in common with its classes, as a dictionary that a hook writes and ``forward`` reads, would
    have two of them with the program's classes: it gets others, which have them in common with the copy.
    """
    walk = _walk(classes)
    others = list(others)
    tied = (
        any(walk.has_met(other) for other in others if not _is_single(other))
        or any(walk.has_met_storage(storage) for storage in storages)
        or _have_a_variable_in_common(walk.met, others)
    )
    trackers = tuple(cloudpickle.cloudpickle._get_or_create_tracker_id(cls) for cls in classes)
    return Family(walk.hexdigest(), "" if tied else _PROGRAM, trackers, walk.has_met)


def _is_single(thing: Any) -> bool:
    return isinstance(thing, _SINGLE) or (isinstance(thing, FunctionType) and is_importable(thing))


def _have_a_variable_in_common(some: Iterable[Any], others: Iterable[Any]) -> bool:
    """Whether functions on both sides use a global name that one of them assigns to."""
    codes = [
        [thing.__code__ for thing in side if isinstance(thing, FunctionType) and home_of(thing) is None]
        for side in (some, others)
    ]
    used = [set[str]().union(*map(global_names, side)) for side in codes]
    assigned = {name for side in codes for code in side for name in global_names(code, "STORE_GLOBAL")}
    return not assigned.isdisjoint(used[0] & used[1])


def find_family(digest: str, program: str, trackers: tuple[str, ...]) -> Reading:
    """What gives a load its classes."""
    return Reading(Family(digest, program, trackers).is_here())


def find_fake_family(*_: Any) -> Reading:
    """What gives a load its classes, without weights."""
    return FakeReading()


def new_class(reading: Reading, *arguments: Any) -> type:
    return reading.find(*arguments)


def set_class_state(cls: type, state: tuple[Reading, Any]) -> None:
    reading, attributes = state
    reading.set_state(cls, attributes)


def is_of_its_class(method: MethodType) -> bool:
    """Whether a method is one of a class that travels by value, and so is to be that of the class of the copy."""
    function = method.__func__
    if not isinstance(function, FunctionType) or is_importable(function):
        return False
    name = function.__name__
    owner = next((cls for cls in type(method.__self__).__mro__ if name in vars(cls)), None)
    # A function that somebody has put into a class of a module is not in that class elsewhere.
    return owner is not None and vars(owner)[name] is function and not is_importable(owner)


def method_of(thing: Any, name: str) -> MethodType:
    return MethodType(getattr(type(thing), name), thing)


def _tracked(tracker: str) -> type | None:
    found: type | None = cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker)
    return found


def _walk(classes: Sequence[Any]) -> Canonical:
    walk = Canonical()
    walk.add(list(classes))
    return walk
