"""What the digest's walk and the skeleton's pickler agree on: what is a tensor, what is shared, how things reduce.

Not the walk (`canonical`) and not the pickle (`skeleton`).
"""

from __future__ import annotations

import copyreg
import functools
import io
import typing
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule
from torch.nn.utils import parametrize

from .bytecode import is_importable
from .description import Bytes
from .graphs import new_graph

try:  # It carries more than pickle does (views of dicts, for one), and what it carries counts.
    import cloudpickle
except ImportError:
    cloudpickle = None

# Dictionaries of a module whose keys are torch's count of all hooks that this process ever made.
HOOKS = tuple(name for name in vars(torch.nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called")))

# Bytes above which arrays are shared, and it is told that every process holds another thing for itself.
PRIVATE = 4096

_REDUCERS = cloudpickle.Pickler.dispatch_table if cloudpickle is not None else copyreg.dispatch_table

# By cloudpickle text files travel as their content, which nobody has asked for, and type variables with random ids.
_NOT_BY_CLOUDPICKLE = (io.TextIOWrapper, typing.TypeVar)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a table entry over a storage says all there is to say about ``tensor``.

    But for attributes of its own in ``__dict__``. Others (sparse, quantised, subclasses, conjugate views) go the way
    of torch's own pickling, which comes down to storages and plain tensors again.
    """
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor._backward_hooks
    )


def reduce(obj: Any) -> Any:
    """What pickle stores of ``obj``, of those that it does not handle by itself."""
    reducer = _REDUCERS.get(type(obj)) if type(obj) not in _NOT_BY_CLOUDPICKLE else None
    return reduce_refused(obj) or (reducer(obj) if reducer is not None else obj.__reduce_ex__(4))


def reduce_refused(obj: Any) -> Any:
    """How to carry what pickle, with or without cloudpickle, does not; None for anything else."""
    kind = type(obj)
    if isinstance(obj, torch.nn.Module) and kind.__module__ == parametrize.__name__ and not is_importable(kind):
        # A class of its own for each module with parametrizations, whose __getstate__ only refuses.
        base: Any = kind.__bases__[0]
        names = tuple(vars(obj)["_modules"]["parametrizations"])
        return new_parametrized, (base, names), base.__getstate__(obj)
    if isinstance(obj, GraphModule) and _same(kind.__reduce__, GraphModule.__reduce__):
        return new_graph, (*obj.__reduce__(), tuple(node.name for node in obj.graph.nodes))
    parameter = torch.nn.Parameter
    if isinstance(obj, parameter) and kind is not parameter and _same(kind.__reduce_ex__, parameter.__reduce_ex__):
        # Torch makes a plain Parameter of a subclass's.
        return new_subclass, (kind, *obj.__reduce_ex__(4))  # type: ignore[no-untyped-call]
    if isinstance(obj, torch.nn.Module) and _same(kind.__getstate__, torch.nn.Module.__getstate__):
        names = copyreg._slotnames(kind)  # type: ignore[attr-defined]
        slots = {name: getattr(obj, name) for name in names if hasattr(obj, name)}
        if slots:  # which torch leaves out
            reduced: Any = obj.__reduce_ex__(4)
            function, arguments, state = reduced[:3]
            return function, arguments, (state, slots), None, None, set_state
    if kind is functools._lru_cache_wrapper and not is_importable(obj):
        return new_cache, (obj.__wrapped__, obj.cache_parameters())
    if kind is functools.cached_property:
        return kind, (obj.func,), {"attrname": obj.attrname}  # and not its lock, which it had up to Python 3.11
    return None


def new_parametrized(base: type[torch.nn.Module], names: tuple[str, ...]) -> torch.nn.Module:
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _same(one: Any, other: Any) -> bool:
    return one is other


def new_subclass(kind: type, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a reduction makes, as an instance of a subclass."""
    made = function(*arguments)
    made.__class__ = kind
    return made


def set_state(module: torch.nn.Module, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Give a module its attributes, and what is in its slots."""
    attributes, slots = state
    module.__setstate__(attributes)  # type: ignore[no-untyped-call]
    for name, value in slots.items():
        object.__setattr__(module, name, value)  # past torch's, which would register it


def new_cache(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def shared_bytes(array: np.ndarray[Any, Any], small: bool = False) -> torch.Tensor | None:
    """The bytes of an array that is shared as a tensor is (uint8, no copy); None for others.

    Small arrays are shared only where a tensor lies over them (``small``).
    """
    whole = array.flags.c_contiguous or array.flags.f_contiguous
    if type(array) is not np.ndarray or array.nbytes <= PRIVATE * (not small) or array.dtype.hasobject or not whole:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arrays that are not writable
        return torch.from_numpy(array.ravel(order="K").view(np.uint8))


def storage_bytes(storage: torch.UntypedStorage) -> Bytes:
    """Bytes of a storage: a view of them where it is on the CPU."""
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    array: Bytes = flat.cpu().numpy()
    return array


def storage_key(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """Key that is equal for two storages exactly if they are the same memory."""
    if storage.nbytes() == 0:
        return ("empty", storage._cdata)
    return (str(storage.device), storage.data_ptr(), storage.nbytes())
