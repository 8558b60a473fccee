"""The digest of a model: equal content gives equal digests, in every process.

Pickle bytes cannot serve: sets come in another order with another PYTHONHASHSEED, classes of ``__main__`` carry
random tracker ids, and memo references depend on object identity. So the object graph is walked here in its own
order and fed to a hash. Not for storage: nothing is ever rebuilt from what this module writes.

Classes and functions count by qualified name and by a hash of their compiled code (so a changed ``forward`` is a
new version); those that travel by value, as classes of ``__main__`` do, also by their other members and by the globals
they use. Code is compared as bytecode: digests agree between processes of one Python minor version.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import io
import struct
import sys
import types
import typing
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from .programs import is_program, program_digest

try:  # It carries more than pickle does (views of dicts, for one), and what it carries counts.
    import cloudpickle
except ImportError:
    cloudpickle = None

# Of a class's namespace: what the interpreter adds by itself, or what changes without changing behaviour.
_INCIDENTAL = frozenset(
    {
        *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__slotnames__", "__abstractmethods__"),
        *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__type_params__"),
        *("__static_attributes__", "__firstlineno__", "__parameters__", "__orig_bases__", "_abc_impl"),
        *("__dataclass_fields__", "__dataclass_params__"),
    }
)

# Dictionaries of a module whose keys are torch's count of all hooks that this process ever made.
HOOKS = tuple(name for name in vars(torch.nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called")))

# Bytes above which arrays are shared, and it is told that every process holds another thing for itself.
PRIVATE = 4096

# Each level multiplies the walks; objects that know one another through sets would take for ever.
_MOST_NESTED_SETS = 4

_REDUCERS = cloudpickle.Pickler.dispatch_table if cloudpickle is not None else copyreg.dispatch_table

# By cloudpickle text files travel as their content, which nobody has asked for, and type variables with random ids.
_NOT_BY_CLOUDPICKLE = (io.TextIOWrapper, typing.TypeVar)


class Canonical:
    """Walk of one object graph, feeding a SHA-256.

    Parameters
    ----------
    storage_digest : callable
        Gives the content digest (bytes) of a ``torch.UntypedStorage``.

    Attributes
    ----------
    packages : set of str
        Top-level packages whose classes or functions were met by reference.
    """

    def __init__(self, storage_digest: Callable[[torch.UntypedStorage], bytes]):
        self.packages: set[str] = set()
        self._storage_digest = storage_digest
        self._hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an id may not be reused while the walk lasts
        self._storages: dict[tuple[Any, ...], int] = {}
        self._hooks: dict[int, int] = {}  # numbers of hooks in this walk, by torch's
        self._hook_dicts: set[int] = set()
        self._names: dict[int, str] = {}  # of modules and parameters in the first module met
        self._depth = 0  # of sets within sets

    def hexdigest(self) -> str:
        """Hexadecimal SHA-256 of everything walked so far."""
        return self._hash.hexdigest()

    def add(self, obj: Any) -> None:
        """Feed ``obj`` and all it refers to."""
        kind = type(obj)
        atom = _ATOMS.get(kind)
        if atom is not None:
            self._emit(kind.__name__, atom(obj))
            return
        if kind in (tuple, frozenset) and all(type(item) in _ATOMS for item in obj):
            self._collection(obj)  # by value: whether two equal ones are one object is up to the compiler
            return
        if isinstance(obj, np.dtype):
            # By value: NumPy makes and shares them at will.
            self._emit("numpy.dtype", repr(obj.__reduce__()[1:]).encode())
            return
        if kind is types.CellType:
            # By value: cloudpickle gives every function cells of its own.
            self._sequence("cell", [obj.cell_contents] if _filled(obj) else [])
            return
        number = self._seen.get(id(obj))
        if number is not None:
            self._emit("again", str(number).encode())
            return
        self._seen[id(obj)] = len(self._seen)
        self._alive.append(obj)
        if id(obj) in self._hook_dicts:
            self._sequence("hooks", [part for key, hook in obj.items() for part in (self._hook_number(key), hook)])
        elif kind in (tuple, list, set, frozenset, weakref.WeakSet):
            self._collection(obj)
        elif kind is dict:
            self._sequence("dict", [part for item in obj.items() for part in item])
        elif isinstance(obj, torch.Tensor) and is_plain(obj):
            self._tensor(obj)
        elif isinstance(obj, np.ndarray) and (flat := shared_bytes(obj)) is not None:
            layout = (obj.dtype.__reduce__()[1:], obj.shape, obj.strides, obj.flags.writeable)
            self._emit("array", repr(layout).encode())
            self._storage(flat.untyped_storage())
        elif is_program(obj):
            self._emit("program", program_digest(obj))
        elif isinstance(obj, torch.storage.TypedStorage):
            self._emit("typed-storage", str(obj.dtype).encode())
            self._storage(obj._untyped_storage)
        elif isinstance(obj, torch.UntypedStorage):
            self._storage(obj)
        elif isinstance(obj, type):
            self._class(obj)
        elif kind is types.FunctionType:
            self._function(obj)
        elif kind is types.BuiltinFunctionType and isinstance(obj.__self__, types.ModuleType | None):
            self._reference("builtin", obj.__module__ or "", obj.__qualname__)
        elif kind is types.ModuleType:
            self._reference("module", obj.__name__)
        elif kind is types.MethodType:
            self._sequence("method", [obj.__self__, obj.__func__])
        elif kind in (staticmethod, classmethod):
            self._sequence(kind.__name__, [obj.__func__])
        elif kind is property:
            self._sequence("property", [obj.fget, obj.fset, obj.fdel])
        elif kind is types.MappingProxyType:
            self._sequence("mappingproxy", [dict(obj)])
        elif kind is types.CodeType:
            self._emit("code", code_digest(obj))
        elif kind is RemovableHandle:
            self._handle(obj)
        else:
            self._reduced(obj)

    def _emit(self, kind: str, content: bytes) -> None:
        # Lengths in front make the stream unambiguous: no two graphs give the same bytes.
        tag = kind.encode()
        self._hash.update(struct.pack("<IQ", len(tag), len(content)))
        self._hash.update(tag)
        self._hash.update(content)

    def _reference(self, kind: str, module: str, name: str = "", by_value: bool = False) -> None:
        if not by_value:
            self.packages.add(module.partition(".")[0])
        self._emit(kind, f"{module}:{name}".encode())

    def _sequence(self, kind: str, items: Iterable[Any]) -> None:
        items = list(items)
        self._emit(kind, str(len(items)).encode())
        for item in items:
            self.add(item)

    def _collection(self, items: Collection[Any]) -> None:
        kind = type(items).__name__
        if isinstance(items, tuple | list):
            self._sequence(kind, items)
            return
        # Parts of the model in the order of their names, others in that of their digests. The digest of a thing not
        # met before costs a walk, and a lone one needs none.
        named = sorted((item for item in items if id(item) in self._names), key=lambda item: self._names[id(item)])
        others = [item for item in items if id(item) not in self._names]
        known = [item for item in others if type(item) in _ATOMS or id(item) in self._seen]
        new = [item for item in others if type(item) not in _ATOMS and id(item) not in self._seen]
        new = sorted(new, key=self._digest_of) if len(new) > 1 else new
        self._sequence(kind, [*named, *sorted(known, key=self._digest_of), *new])

    def _digest_of(self, item: Any) -> bytes:
        """Digest of ``item`` as if it came next; the walk forgets that it was here."""
        if self._depth == _MOST_NESTED_SETS:
            raise ValueError(f"sets of {type(item).__name__} within sets have no order that two processes agree on")
        self._depth += 1
        kept, self._hash = self._hash, hashlib.sha256()
        numberings: tuple[dict[Any, int], ...] = (self._seen, self._storages, self._hooks)
        lengths = [len(numbering) for numbering in numberings]
        self.add(item)
        for numbering, length in zip(numberings, lengths, strict=True):
            while len(numbering) > length:
                numbering.popitem()
        digest, self._hash = self._hash.digest(), kept
        self._depth -= 1
        return digest

    def _tensor(self, tensor: torch.Tensor) -> None:
        layout = (
            type(tensor).__name__,
            str(tensor.dtype),
            tensor.storage_offset(),
            tuple(tensor.size()),
            tuple(tensor.stride()),
            tensor.requires_grad,
        )
        self._emit("tensor", repr(layout).encode())
        self._storage(tensor.untyped_storage())
        if tensor.__dict__:
            self._sequence("attributes", [tensor.__dict__])

    def _storage(self, storage: torch.UntypedStorage) -> None:
        self._alive.append(storage)
        key = storage_key(storage)
        number = self._storages.setdefault(key, len(self._storages))
        self._emit("storage", str(number).encode() + b":" + self._storage_digest(storage))

    def _class(self, cls: type) -> None:
        # Classes of the interpreter itself are not all to be found under their names, as NoneType.
        by_value = not is_importable(cls) and bool(cls.__flags__ & _HEAP_TYPE)
        self._reference("class", cls.__module__, cls.__qualname__, by_value)
        for base in cls.__bases__:
            if base is not object:
                self.add(base)
        if not by_value:
            self._emit("code", class_code(cls))
            return
        if type(cls) is not type:
            self.add(type(cls))
        for name, value in sorted(vars(cls).items()):
            # Slots are told by __slots__; what stands for them does not survive every pickle.
            if name not in _INCIDENTAL and not isinstance(value, types.MemberDescriptorType):
                self._emit("member", name.encode())
                self.add(value)

    def _function(self, function: types.FunctionType) -> None:
        by_value = not is_importable(function)
        self._reference("function", function.__module__ or "", function.__qualname__, by_value)
        if not by_value:
            self._emit("code", member_code(function))
            return
        self._emit("code", code_digest(function.__code__))
        for part in (function.__defaults__, function.__kwdefaults__, function.__closure__, function.__dict__):
            self.add(part)
        home = home_of(function)
        if home is not None:
            self._reference("globals", home.__name__)
            return
        for name in sorted(_global_names(function.__code__) & function.__globals__.keys()):
            self._emit("global", name.encode())
            self.add(function.__globals__[name])

    def _handle(self, handle: RemovableHandle) -> None:
        tables = [table() for table in (handle.hooks_dict_ref, *handle.extra_dict_ref)]
        self._hook_dicts.update(id(table) for table in tables if table is not None)
        self._sequence("handle", [self._hook_number(handle.id), *tables])

    def _hook_number(self, key: int) -> int:
        return self._hooks.setdefault(key, len(self._hooks))

    def _reduced(self, obj: Any) -> None:
        """Walk what pickle would store of ``obj``."""
        if isinstance(obj, torch.nn.Module):
            self._names = self._names or _names_in(obj)
            self._hook_dicts.update(id(table) for name in HOOKS if (table := vars(obj).get(name)) is not None)
        reduced = reduce(obj)
        self._alive.append(reduced)
        if isinstance(reduced, str):
            self._reference("global", getattr(obj, "__module__", None) or type(obj).__module__, reduced)
            self._emit("code", member_code(obj))
            return
        function, arguments, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
        if isinstance(obj, set | frozenset):
            arguments = [frozenset(part) if isinstance(part, list) else part for part in arguments]
        self._emit("object", type(obj).__qualname__.encode())
        for part in (function, arguments, state, setter):
            self.add(part)
        self._sequence("items", items or ())
        self._sequence("pairs", [part for pair in pairs or () for part in pair])


_ATOMS: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda _: b"",
    bool: lambda value: b"1" if value else b"0",
    int: lambda value: hex(value).encode(),
    float: lambda value: struct.pack("<d", value),
    complex: lambda value: struct.pack("<dd", value.real, value.imag),
    str: lambda value: value.encode("utf-8", "surrogatepass"),
    bytes: lambda value: value,
    type(Ellipsis): lambda _: b"",
    type(NotImplemented): lambda _: b"",
    torch.dtype: lambda value: str(value).encode(),
    torch.device: lambda value: str(value).encode(),
    torch.Size: lambda value: repr(tuple(value)).encode(),
}

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


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
        return _new_parametrized, (base, names), base.__getstate__(obj)
    if kind is functools._lru_cache_wrapper and not is_importable(obj):
        return _new_cache, (obj.__wrapped__, obj.cache_parameters())
    if kind is functools.cached_property:
        return kind, (obj.func,), {"attrname": obj.attrname}  # and not its lock, which it had up to Python 3.11
    return None


def _new_parametrized(base: type[torch.nn.Module], names: tuple[str, ...]) -> torch.nn.Module:
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _names_in(model: torch.nn.Module) -> dict[int, str]:
    # Torch's own methods: models override them, also with fewer arguments.
    parts = [*torch.nn.Module.named_modules(model), *torch.nn.Module.named_parameters(model)]
    return {id(part): name for name, part in parts}


def _new_cache(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def shared_bytes(array: np.ndarray[Any, Any]) -> torch.Tensor | None:
    """The bytes of an array that is shared as a tensor is (uint8, no copy); None for small ones and others."""
    whole = array.flags.c_contiguous or array.flags.f_contiguous
    if type(array) is not np.ndarray or array.nbytes <= PRIVATE or array.dtype.hasobject or not whole:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arrays that are not writable
        return torch.from_numpy(array.ravel(order="K").view(np.uint8))


def storage_key(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """Key that is equal for two storages exactly if they are the same memory."""
    if storage.nbytes() == 0:
        return ("empty", storage._cdata)
    return (str(storage.device), storage.data_ptr(), storage.nbytes())


def is_importable(obj: Any) -> bool:
    """Whether another process finds ``obj`` by importing its module (else it must travel by value)."""
    module = getattr(obj, "__module__", None)
    if module is None or module not in sys.modules or not _by_reference(module):
        return False
    found: Any = sys.modules[module]
    for name in obj.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is obj


def home_of(function: types.FunctionType) -> types.ModuleType | None:
    """The importable module whose globals a function uses; None: they travel with the function, by value.

    A function made within one of the module's shares state with it through them, as hooks of transformers do.
    """
    module = sys.modules.get(function.__module__ or "")
    if module is None or vars(module) is not function.__globals__ or getattr(module, "__spec__", None) is None:
        return None
    return module if _by_reference(module.__name__) else None


def _by_reference(module: str) -> bool:
    return module != "__main__" and not (
        cloudpickle is not None
        and any(f"{module}.".startswith(f"{name}.") for name in cloudpickle.list_registry_pickle_by_value())
    )


@functools.cache
def class_code(cls: type) -> bytes:
    """SHA-256 of the compiled code of the functions that an importable ``cls`` itself defines."""
    total = hashlib.sha256()
    for name, value in sorted(vars(cls).items()):
        code = member_code(value)
        if code:
            total.update(name.encode() + b"\0" + code)
    return total.digest()


def member_code(value: Any) -> bytes:
    """Code and constant defaults of all functions in a function or class member, decorated or not; or nothing."""
    return b"".join(_function_codes(value, set()))


def _function_codes(value: Any, seen: set[int]) -> Iterator[bytes]:
    if id(value) in seen:
        return
    seen.add(id(value))
    within: list[Any] = []
    if isinstance(value, types.FunctionType):
        yield code_digest(value.__code__)
        yield _constant((value.__defaults__, tuple((value.__kwdefaults__ or {}).items())))
        # A decorator that does not say __wrapped__ has what it decorates in its closure.
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        within = [value.__dict__.get("__wrapped__"), *(cell for cell in cells if isinstance(cell, types.FunctionType))]
    elif isinstance(value, staticmethod | classmethod):
        yield type(value).__name__.encode()
        within = [value.__func__]
    elif isinstance(value, property):
        within = [value.fget, value.fset, value.fdel]
    elif isinstance(value, functools.partial | functools.partialmethod | functools.cached_property):
        within = [value.func]
    elif isinstance(value, functools._lru_cache_wrapper):
        within = [value.__wrapped__]
    for part in within:
        yield from _function_codes(part, seen)


def code_digest(code: types.CodeType) -> bytes:
    """SHA-256 of a code object without file names and line numbers; constant sets are sorted."""
    total = hashlib.sha256(code.co_code)
    total.update(
        repr(
            (
                (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars),
                (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
                (code.co_flags, code.co_exceptiontable),
            )
        ).encode()
    )
    for constant in code.co_consts:
        total.update(_constant(constant))
    return total.digest()


def _constant(value: Any) -> bytes:
    """SHA-256 of a constant; of a thing that a compiler could not have made, its class alone counts."""
    if isinstance(value, types.CodeType):
        return code_digest(value)
    if isinstance(value, frozenset):
        return b"{" + b"".join(sorted(_constant(item) for item in value)) + b"}"
    if isinstance(value, tuple):
        return b"(" + b"".join(_constant(item) for item in value) + b")"
    content = repr(value) if type(value) in _ATOMS or isinstance(value, slice) else ""
    return hashlib.sha256(f"{type(value).__name__}:{content}".encode("utf-8", "surrogatepass")).digest()


def _global_names(code: types.CodeType) -> set[str]:
    # Not co_names, which has the names of attributes as well.
    names = {step.argval for step in dis.get_instructions(code) if "GLOBAL" in step.opname}
    return names.union(
        *(_global_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    )


def _filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
