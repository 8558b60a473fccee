"""A module without its tensors, as a pickle: written with every tensor taken out, read with views put in.

Most of a load is the reading of this pickle, so it is written to be read fast: a plain module takes its unpickled
``__dict__`` for its own, instead of having torch copy it in Python, and empty hook dictionaries are made by their type
alone. Reading one runs code.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from enum import EnumType
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.nn import Module

from .bytecode import home_of, is_left_behind
from .classes import (
    Family,
    family_of,
    find_fake_family,
    find_family,
    is_of_its_class,
    method_of,
    new_class,
    set_class_state,
)
from .graphs import new_graph
from .pickling import (
    PRIVATE,
    is_plain,
    new_cache,
    new_parametrized,
    new_subclass,
    reduce_refused,
    set_state,
    shared_bytes,
)
from .programs import as_tensor, is_program, load_exported, load_script, program_bytes
from .taken import Taken

try:  # Classes of __main__, lambdas and closures travel by value where cloudpickle is installed.
    from cloudpickle import Pickler as _BasePickler
    from cloudpickle.cloudpickle import _decompose_typevar, _dynamic_class_reduce, _make_typevar
except ImportError:
    from pickle import Pickler as _BasePickler


def _attributes_of_a_module() -> frozenset[str]:
    module = Module.__new__(Module)
    Module.__setstate__(module, {})  # type: ignore[no-untyped-call]
    return frozenset(vars(module))


# What Module.__setstate__ adds to a state that lacks it; one that has it all can be taken as it is.
_EXPECTED = _attributes_of_a_module()


def dump(obj: Any) -> tuple[bytes, Taken]:
    """Pickle of ``obj`` without tensors and storages, and these."""
    file, taken = io.BytesIO(), Taken()
    splitter: Any = _Splitter(file, taken, None)
    splitter.dump(obj)
    arrays = taken.small_arrays_under_tensors()
    if not splitter.left_out and not arrays:
        return file.getvalue(), taken
    # What was met beside the classes tells what they are to be in the copy.
    others = (other for _, other in splitter.memo.copy().values())
    family = family_of(splitter.left_out, others, taken.storages) if splitter.left_out else None
    file, again = io.BytesIO(), Taken()
    again.programs, again.arrays_under_tensors = taken.programs, arrays
    _Splitter(file, again, family).dump(obj)
    return file.getvalue(), again


def load(skeleton: bytes, tensors: Sequence[torch.Tensor], storages: Sequence[Any] | None) -> Any:
    """The object of a skeleton, with these tensors and storages in their places.

    Without storages the tensors are fake, and those of unusual kinds raise `NotImplementedError`.
    """
    unpickler: Any = pickle.Unpickler(io.BytesIO(skeleton))
    table = _Table(enumerate(tensors, len(_FUNCTIONS)))
    table.storages = storages
    fake = storages is None
    adopt_tensor, array = (_update_fake, _array_fake) if fake else (_ADOPT_TENSOR, _array)
    table.update(enumerate((_ADOPT, adopt_tensor, tensors.__getitem__, array, *_CONSTANT)))
    table[_FIND_FAMILY] = find_fake_family if fake else find_family
    unpickler.persistent_load = table.__getitem__
    return unpickler.load()


def _tensor(number: int) -> torch.Tensor:
    """Stands for the table of tensors, which a skeleton is read with."""
    raise NotImplementedError


def _update_fake(tensor: torch.Tensor, attributes: dict[str, Any]) -> None:
    tensor.__dict__.update(attributes)  # where a fake tensor has attributes of its own


def _array(flat: torch.Tensor, dtype: Any, shape: tuple[int, ...], order: Any, writable: bool) -> Any:
    """The array over these bytes (uint8)."""
    array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, flat.numpy(), order=order)
    array.flags.writeable = writable
    return array


def _array_fake(_: torch.Tensor, dtype: Any, shape: tuple[int, ...], order: Any, writable: bool) -> Any:
    array = np.zeros(shape, dtype, order=order)
    array.flags.writeable = writable
    return array


# Functions that a skeleton calls, by their numbers in it (most are C's); tensors have the numbers that follow.
_ADOPT = vars(Module)["__dict__"].__set__  # module.__dict__ = state
_ADOPT_TENSOR = vars(torch.Tensor)["__dict__"].__set__
_CONSTANT = (new_parametrized, new_graph, new_subclass, set_state, new_cache, load_script, load_exported)
_FUNCTIONS = {id(f): number for number, f in enumerate((_ADOPT, _ADOPT_TENSOR, _tensor, _array, *_CONSTANT))}
_FIND_FAMILY = -1

_PRIVATE = frozenset((bytes, bytearray, str))

# Length of a reduction with a function that sets the state, as cloudpickle has of a class that it makes
_WITH_STATE_SETTER = 6


class _Splitter(_BasePickler):  # type: ignore[misc, valid-type, unused-ignore]
    """The pickler; without a family it leaves out classes that travel by value, with all that they alone hold."""

    def __init__(self, file: io.BytesIO, taken: Taken, family: Family | None):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._taken = taken
        self._family = family
        self.left_out: list[type] = []

    def persistent_id(self, obj: Any) -> int | tuple[int, str] | None:
        if isinstance(obj, torch.Tensor):
            return self._taken.tensor(obj) + len(_FUNCTIONS) if is_plain(obj) and not obj.__dict__ else None
        if isinstance(obj, torch.storage.TypedStorage):
            return self._taken.storage(obj._untyped_storage), str(obj.dtype).removeprefix("torch.")
        if isinstance(obj, torch.UntypedStorage):
            return self._taken.storage(obj), ""
        if type(obj) in _PRIVATE and len(obj) > PRIVATE:
            self._taken.private.append((obj, len(obj)))
        return _FIND_FAMILY if obj is find_family else _FUNCTIONS.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if is_program(obj):
            content = self._taken.programs[id(obj)][1] if id(obj) in self._taken.programs else program_bytes(obj)
            self._taken.programs[id(obj)] = obj, content
            self._taken.private.append((obj, len(content)))
            return load_exported if isinstance(obj, ExportedProgram) else load_script, (as_tensor(content),)
        if isinstance(obj, np.ndarray):
            flat = shared_bytes(obj, id(obj) in self._taken.arrays_under_tensors)
            if flat is not None:
                self._taken.arrays[id(flat)] = obj
                order = "C" if obj.flags.c_contiguous else "F"
                return _array, (flat, obj.dtype, obj.shape, order, obj.flags.writeable)
            self._taken.copied.append(obj)
            if obj.nbytes > PRIVATE:
                self._taken.private.append((obj, obj.nbytes))
        if type(obj) is MethodType and is_of_its_class(obj) and not (self._family and self._family.holds(obj.__self__)):
            return method_of, (obj.__self__, obj.__func__.__name__)
        if isinstance(obj, torch.Tensor) and is_plain(obj):
            # Attributes that somebody has set on it, as `from_pretrained` does on each.
            return _tensor, (self._taken.tensor(obj),), obj.__dict__, None, None, _ADOPT_TENSOR
        if type(obj) is OrderedDict and not obj and not vars(obj):
            return copyreg.__newobj__, (OrderedDict,)  # type: ignore[attr-defined]
        reduced = reduce_refused(obj)
        if reduced is None and isinstance(obj, Module) and type(obj).__setstate__ is Module.__setstate__:
            reduced = _reduced_plainly(obj)
        if reduced is not None:
            return reduced
        override = getattr(super(), "reducer_override", None)
        if override is None:
            reduced = NotImplemented
        elif is_left_behind(obj):
            if isinstance(obj, TypeVar):
                return _make_typevar, _decompose_typevar(obj)
            reduced = self._dynamic_function_reduce(obj) if type(obj) is FunctionType else _dynamic_class_reduce(obj)
        else:
            reduced = override(obj)
        if type(obj) is FunctionType and isinstance(reduced, tuple):
            return _with_globals_of_its_module(obj, reduced)
        if isinstance(obj, type) and isinstance(reduced, tuple) and len(reduced) == _WITH_STATE_SETTER:
            if self._family is None:
                self.left_out.append(obj)
                return object, ()
            return _as_one_class(obj, reduced, self._family)
        return reduced


class _Globals:
    """The globals of an importable module, and not copies of some."""

    def __init__(self, module: ModuleType):
        self._module = module

    def __reduce__(self) -> Any:
        return vars, (self._module,)


def _with_globals_of_its_module(function: FunctionType, reduced: Any) -> Any:
    """What cloudpickle makes of a function that travels by value, with the globals that it has."""
    home = home_of(function)
    if home is None:
        return reduced
    make, (code, _, *others), (attributes, slots), *rest = reduced
    return make, (code, _Globals(home), *others), (attributes, slots | {"__globals__": {}}), *rest


def _as_one_class(cls: type, reduced: Any, family: Family) -> Any:
    """What cloudpickle makes of a class that travels by value, under its whole name, and never twice."""
    make, (*arguments, tracker, extra), state, *_ = reduced
    if not isinstance(cls, EnumType):  # of enumerations it tells the name
        kind, name, bases, namespace = arguments
        arguments = [kind, name, bases, namespace | {"__qualname__": cls.__qualname__}]
    made = (family, make, (*arguments, family.key(tracker), extra), tracker)
    return new_class, made, (family, state), None, None, set_class_state


def _reduced_plainly(module: Module) -> Any:
    """How to pickle a module whose state becomes its ``__dict__`` as it is; None for others."""
    if type(module) in copyreg.dispatch_table:
        return None
    reduced = module.__reduce_ex__(4)
    if not isinstance(reduced, tuple):
        return None
    function, arguments, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
    plain = function is copyreg.__newobj__ and (items, pairs, setter) == (None, None, None)  # type: ignore[attr-defined]
    if not plain or type(state) is not dict or not state.keys() >= _EXPECTED:
        return None
    return function, arguments, state, None, None, _ADOPT


class _Table(dict[Any, Any]):
    """What stands at each number of a skeleton; storages, of tensors of unusual kinds, have a pair of their own."""

    storages: Sequence[Any] | None

    def __missing__(self, number: tuple[int, str]) -> Any:
        if self.storages is None:
            raise NotImplementedError("tensors of unusual kinds have no shape without their weights")
        index, dtype = number
        storage = self.storages[index]
        if not dtype:
            return storage
        kind: Any = torch.storage.TypedStorage
        return kind(wrap_storage=storage, dtype=getattr(torch, dtype), _internal=True)
