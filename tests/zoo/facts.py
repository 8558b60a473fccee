"""All that can be seen of a tensor or of any object: values, bytes, flags, and which of its parts are one."""

from __future__ import annotations

import ctypes
import enum
import sys
import types
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

PLAIN = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout}
EMPTY = {dict, OrderedDict, list, set}
HOOKS = ("_hooks", "_with_kwargs", "_always_called")
_IS_LEAF = 4  # its place in `facts`, after the class
OF_EVERY_CLASS = {"__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__"}


def content(storage: torch.UntypedStorage) -> int:
    """CRC-32 of all bytes of a storage, also of those that no view shows: it is never the same if 32 bits in a row or
    fewer differ."""
    nbytes = storage.nbytes()
    array = (ctypes.c_char * nbytes).from_address(storage.data_ptr()) if nbytes else b""
    return zlib.crc32(array)


def memory(storage: torch.UntypedStorage) -> Any:
    """Equal for storages that are the same bytes."""
    return (storage.data_ptr(), storage.nbytes()) if storage.nbytes() else storage._cdata


def facts(tensor: torch.Tensor, whole: bool = True) -> Any:
    """All there is to know of a tensor but which one it is; of its storage, only what it shows if that is not whole."""
    known = [type(tensor), tensor.dtype, tensor.layout, tensor.requires_grad, tensor.device, tensor.is_leaf]
    # Torch's compiler leaves a mark on each.
    known += [[name for name in tensor.__dict__ if not name.startswith("_dynamo")]]
    known += [tensor.is_quantized, tensor.is_nested, tensor.is_conj(), tensor.is_neg()]
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return [*known, repr(context), [(name, facts(getattr(tensor, name))) for name in names]]
    if tensor.is_nested:
        return [*known, [facts(part) for part in tensor.unbind()]]
    known.append(tensor.shape)
    if tensor.is_quantized:
        known += [str(tensor.qscheme()), *quantisation(tensor), tensor.stride(), tensor.storage_offset()]
        return [*known, content(tensor.untyped_storage())]
    if tensor.layout is torch.sparse_coo:
        return [*known, tensor.is_coalesced(), facts(tensor._indices()), facts(tensor._values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [*known, facts(tensor.crow_indices()), facts(tensor.col_indices()), facts(tensor.values())]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [*known, facts(tensor.ccol_indices()), facts(tensor.row_indices()), facts(tensor.values())]
    if tensor.layout is torch._mkldnn:
        return [*known, facts(tensor.to_dense())]
    known += [tensor.stride(), tensor.storage_offset()]
    if tensor.device.type != "cpu":
        return known
    shown = tensor if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
    return [*known, content(shown.untyped_storage())]


def quantisation(tensor: torch.Tensor) -> list[Any]:
    if tensor.qscheme() is torch.per_tensor_affine:
        return [tensor.q_scale(), tensor.q_zero_point()]
    scales, points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return [scales.dtype, scales.tolist(), points.dtype, points.tolist(), tensor.q_per_channel_axis()]


def named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters and buffers with their names; tied ones once for each."""
    # Torch's own methods: a model of the zoo overrides them.
    parameters = nn.Module.named_parameters(model, remove_duplicate=False)
    return [*parameters, *nn.Module.named_buffers(model, remove_duplicate=False)]


def filled(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Those of `named` that have a shape."""
    return [(name, tensor) for name, tensor in named(model) if not nn.parameter.is_lazy(tensor)]


def in_memory(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Those of `named` that lie in one storage of this machine."""
    tensors = [(name, t) for name, t in filled(model) if t.layout is torch.strided and not t.is_nested]
    tensors = [(name, t) for name, t in tensors if not hasattr(t, "__tensor_flatten__")]
    return [(name, tensor) for name, tensor in tensors if tensor.device.type == "cpu"]


class Facts:
    """All there is to know of an object, by the way to it: values, the bytes of tensors, and which objects are one."""

    def __init__(self, value: Any, whole: bool = True):
        self.found: dict[str, Any] = {}
        self._whole = whole
        self.tensors = 0
        self._first: dict[Any, Any] = {}  # the way to each object and each memory, when it was met first
        self._kept: list[Any] = []  # so that no two objects have one id
        self._hooks: dict[int, int] = {}  # numbers of hooks here, by torch's, which counts those of a process
        self._hook_tables: set[int] = set()
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
        elif isinstance(value, type | types.ModuleType | types.BuiltinFunctionType) and _importable(value):
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
            self._add_new(path, value, f"{kind.__module__}.{name_of(kind)}")

    def _add_new(self, path: str, value: Any, kind: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._add_tensor(path, value, kind)
        elif isinstance(value, torch.UntypedStorage | torch.storage.TypedStorage):
            self._add_storage(path, value, kind)
        elif isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            code = value.__code__.co_code, value.__code__.co_names, value.__code__.co_varnames
            more = [("defaults", value.__defaults__), ("keywords", value.__kwdefaults__), ("dict", vars(value))]
            name = kind, value.__module__, value.__qualname__, code
            self._parts(path, name, [*enumerate(cells), *(more if not _importable(value) else ())])
        elif isinstance(value, type):
            members = {name: member for name, member in vars(value).items() if name not in OF_EVERY_CLASS}
            bases = [(f"base {number}", base) for number, base in enumerate(value.__bases__)]
            self._parts(path, (kind, value.__module__, name_of(value)), [*bases, *sorted(members.items())])
        elif isinstance(value, staticmethod | classmethod):
            self._parts(path, kind, [("function", value.__func__)])
        elif isinstance(value, property):
            self._parts(path, kind, [("get", value.fget), ("set", value.fset), ("del", value.fdel)])
        elif isinstance(value, weakref.ref):
            self._parts(path, kind, [("referent", value())])
        elif isinstance(value, RemovableHandle):
            tables = [table() for table in (value.hooks_dict_ref, *value.extra_dict_ref)]
            self._hook_tables |= {id(table) for table in tables}
            self._parts(path, (kind, self._hook(value.id)), enumerate(tables))
        elif isinstance(value, set | frozenset | weakref.WeakSet):
            self.found[path] = kind, sorted(self._label(part) for part in value)
        elif isinstance(value, list):
            self._parts(path, kind, [*enumerate(value), *attributes_of(value)])
        elif id(value) in self._hook_tables:
            self._parts(path, kind, [(self._hook(number), hook) for number, hook in value.items()])
        elif isinstance(value, dict):
            keys = [self._label(key) for key in value]
            values = zip(keys, value.values(), strict=True)
            self._parts(path, (kind, keys), [*values, *attributes_of(value)])
        elif isinstance(value, nn.Module):
            self._add_module(path, value, kind)
        elif isinstance(value, np.dtype | np.generic):
            self.found[path] = kind, repr(value)  # NumPy makes and shares them at will
        elif isinstance(value, types.MappingProxyType):
            self._parts(path, kind, value.items())
        elif isinstance(value, torch.fx.Graph):
            nodes = [(n.op, n.name, str(n.target), repr(n.args), repr(n.kwargs), n.type) for n in value.nodes]
            self.found[path] = kind, nodes, [sorted(node.meta) for node in value.nodes]
        elif isinstance(value, torch.Generator):
            self._parts(path, kind, [("state", self._keep(value.get_state()))])
        elif isinstance(value, torch.ScriptObject):
            self._parts(path, kind, [("state", self._keep(value.__getstate__()))])
        elif kind == "_thread.lock":
            self.found[path] = kind, value.locked()
        else:  # what the object says itself that it is
            function, arguments, state, *iterators = reduced = (*value.__reduce_ex__(4), None)
            items = [list(iterator) for iterator in iterators if iterator is not None]
            self._kept += reduced, items
            parts = sorted(state.items()) if isinstance(state, dict) else [("state", state)]
            self._parts(path, kind, [("function", function), ("arguments", arguments), ("items", items), *parts])

    def _add_tensor(self, path: str, value: torch.Tensor, kind: str) -> None:
        self.tensors += 1
        attributes = [(name, part) for name, part in vars(value).items() if not name.startswith("_dynamo")]
        if hasattr(value, "__tensor_flatten__"):
            attributes = []  # what it consists of is among its facts
        if nn.parameter.is_lazy(value):
            self._parts(path, (kind, value.dtype, value.requires_grad), attributes)
            return
        first = path
        if not value.is_nested and value.layout is torch.strided and not hasattr(value, "__tensor_flatten__"):
            storage = value.untyped_storage()
            self._kept.append(storage)
            first = self._first.setdefault(memory(storage), path)
        told = "" if first == path else f"over the storage of {first}"
        _, *known = facts(value, self._whole)  # the name of its class, and not the class: see _add
        if value.requires_grad and not value.is_leaf:
            known[_IS_LEAF] = True  # what it was worked out from stays behind, as when torch pickles it
        self._parts(path, (kind, known, told), attributes)

    def _add_storage(self, path: str, value: Any, kind: str) -> None:
        storage = value._untyped_storage if isinstance(value, torch.storage.TypedStorage) else value
        self._kept.append(storage)
        first = self._first.setdefault(memory(storage), path)
        dtype = value.dtype if storage is not value else ""
        self.found[path] = kind, dtype, storage.nbytes(), content(storage), "" if first == path else first

    def _add_module(self, path: str, value: nn.Module, kind: str) -> None:
        if isinstance(value, torch.jit.ScriptModule):
            tensors = [(name, facts(tensor)[1:]) for name, tensor in named(value)]
            self.found[path] = "a program", value.original_name, getattr(value, "training", "frozen"), tensors
            return
        found = attributes(value)
        self._hook_tables |= {id(part) for name, part in found.items() if name.endswith(HOOKS)}
        if isinstance(value, torch._dynamo.OptimizedModule):
            found = {name: part for name, part in found.items() if name in ("_orig_mod", "training")}
        if isinstance(value, torch.fx.GraphModule):
            found.pop("_lineno_map", None)
        self._parts(path, kind, sorted(found.items()))

    def _label(self, value: Any) -> str:
        """What tells a member of a set, or a key, from others: itself, or the way to it."""
        if isinstance(value, tuple | frozenset):
            return f"({', '.join(map(self._label, value))})"
        if type(value) in PLAIN or isinstance(value, enum.Enum):
            return repr(value)
        return f"{name_of(type(value))} {self._first.get(id(value), '')}"

    def _keep(self, value: Any) -> Any:
        self._kept.append(value)
        return value

    def _hook(self, number: int) -> int:
        return self._hooks.setdefault(number, len(self._hooks))


def _importable(value: Any) -> bool:
    """Whether it is found by its name, as any other process finds it."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for name in getattr(value, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is value or not isinstance(value, type | types.FunctionType) or value.__module__ == "builtins"


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What of these facts became another."""
    told = []
    for path in dict.fromkeys([*expected, *found]):
        one, other = expected.get(path, "nothing"), found.get(path, "nothing")
        if one != other:
            if isinstance(one, tuple) and isinstance(other, tuple) and one[0] == other[0]:  # all but some is equal
                one, other = ([part for part in a[1] if part not in b[1]] for a, b in [(one, other), (other, one)])
            told.append(f"{path}: {one!s:.300} became {other!s:.300}")
    return told


def name_of(kind: type) -> str:
    return kind.__qualname__


def attributes_of(value: Any) -> list[tuple[str, Any]]:
    return [(f"attribute {name}", part) for name, part in sorted(getattr(value, "__dict__", {}).items())]


def attributes(module: nn.Module) -> dict[str, Any]:
    # Torch leaves out of its pickles that a module is compiled in place: the copy computes without a compiler.
    return {name: value for name, value in vars(module).items() if name != "_compiled_call_impl"}
