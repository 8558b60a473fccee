"""The digest of a model: equal content gives equal digests, in every process.

Pickle bytes cannot serve: sets come in another order with another PYTHONHASHSEED, classes of ``__main__`` carry
random tracker ids, and memo references depend on object identity. So the object graph is walked here in its own
order and fed to a hash. Not for storage: nothing is ever rebuilt from what this module writes.

Classes and functions count by qualified name and by a hash of their compiled code (so a changed ``forward`` is a
new version); those that travel by value, as classes of ``__main__`` do, also by the globals they use. Code is
compared as bytecode: digests agree between processes of one Python minor version.
"""

from __future__ import annotations

import copyreg
import hashlib
import struct
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

# Of a class's namespace: what the interpreter adds by itself, or what changes without changing behaviour.
_INCIDENTAL = frozenset(
    "__dict__ __weakref__ __doc__ __module__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__static_attributes__ __firstlineno__ __qualname__ __abstractmethods__ __slotnames__ __parameters__ "
    "__orig_bases__ __type_params__ _abc_impl __dataclass_fields__ __dataclass_params__".split()
)


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
        number = self._seen.get(id(obj))
        if number is not None:
            self._emit("again", str(number).encode())
            return
        self._seen[id(obj)] = len(self._seen)
        self._alive.append(obj)
        if kind in (tuple, list):
            self._sequence(kind.__name__, obj)
        elif kind is dict:
            self._sequence("dict", [part for item in obj.items() for part in item])
        elif kind in (set, frozenset):
            self._unordered(kind.__name__, obj)
        elif isinstance(obj, torch.Tensor) and is_plain(obj):
            self._tensor(obj)
        elif isinstance(obj, torch.storage.TypedStorage):
            self._emit("typed-storage", str(obj.dtype).encode())
            self._storage(obj.untyped())
        elif isinstance(obj, torch.UntypedStorage):
            self._storage(obj)
        elif isinstance(obj, type):
            self._class(obj)
        elif kind is types.FunctionType:
            self._function(obj, by_value=not is_importable(obj))
        elif kind is types.ModuleType:
            self._reference("module", obj.__name__)
        elif kind is types.CellType:
            self._sequence("cell", [obj.cell_contents] if _filled(obj) else [])
        elif kind is types.MethodType:
            self._sequence("method", [obj.__self__, obj.__func__])
        elif kind in (staticmethod, classmethod):
            self._sequence(kind.__name__, [obj.__func__])
        elif kind is property:
            self._sequence("property", [obj.fget, obj.fset, obj.fdel])
        elif kind is types.MappingProxyType:
            self._sequence("mappingproxy", [dict(obj)])
        elif kind is types.CodeType:
            self._code(obj)
        else:
            self._reduced(obj)

    def _emit(self, kind: str, content: bytes) -> None:
        # Lengths in front make the stream unambiguous: no two graphs give the same bytes.
        tag = kind.encode()
        self._hash.update(struct.pack("<IQ", len(tag), len(content)))
        self._hash.update(tag)
        self._hash.update(content)

    def _reference(self, kind: str, module: str, name: str = "") -> None:
        if module != "__main__":
            self.packages.add(module.partition(".")[0])
        self._emit(kind, f"{module}:{name}".encode())

    def _sequence(self, kind: str, items: Iterable[Any]) -> None:
        items = list(items)
        self._emit(kind, str(len(items)).encode())
        for item in items:
            self.add(item)

    def _unordered(self, kind: str, items: Iterable[Any]) -> None:
        digests = []
        for item in items:
            # Each in a hash of its own, sorted; back references would depend on the order, so none are kept.
            part = Canonical(self._storage_digest)
            part.add(item)
            self.packages |= part.packages
            digests.append(part._hash.digest())
        self._emit(kind, b"".join(sorted(digests)))

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

    def _storage(self, storage: torch.UntypedStorage) -> None:
        self._alive.append(storage)
        key = storage_key(storage)
        number = self._storages.setdefault(key, len(self._storages))
        self._emit("storage", str(number).encode() + b":" + self._storage_digest(storage))

    def _class(self, cls: type) -> None:
        self._reference("class", cls.__module__, cls.__qualname__)
        by_value = not is_importable(cls)
        self._emit("code", class_code(cls))
        for base in cls.__bases__:
            if base is not object:
                self.add(base)
        if by_value:
            for name, value in sorted(vars(cls).items()):
                if name not in _INCIDENTAL:
                    self._emit("member", name.encode())
                    self._member(value)

    def _member(self, value: Any) -> None:
        # A by-value class's own functions travel by value too, whatever their names say.
        if isinstance(value, types.FunctionType):
            self._function(value, by_value=True)
        elif isinstance(value, staticmethod | classmethod):
            self._member(value.__func__)
        elif isinstance(value, property):
            for part in (value.fget, value.fset, value.fdel):
                self._member(part)
        elif isinstance(value, types.GetSetDescriptorType | types.MemberDescriptorType):
            self._emit("slot", b"")
        else:
            self.add(value)

    def _function(self, function: types.FunctionType, by_value: bool) -> None:
        self._reference("function", function.__module__ or "", function.__qualname__)
        self._emit("code", code_digest(function.__code__))
        if not by_value:
            return
        for part in (function.__defaults__, function.__kwdefaults__, function.__closure__):
            self.add(part)
        for name in sorted(_global_names(function.__code__) & function.__globals__.keys()):
            self._emit("global", name.encode())
            self.add(function.__globals__[name])

    def _code(self, code: types.CodeType) -> None:
        self._emit("code", code_digest(code))

    def _reduced(self, obj: Any) -> None:
        """Walk what pickle would store of ``obj``."""
        reducer = copyreg.dispatch_table.get(type(obj))
        reduced = reducer(obj) if reducer is not None else obj.__reduce_ex__(4)
        self._alive.append(reduced)
        if isinstance(reduced, str):
            self._reference("global", getattr(obj, "__module__", None) or type(obj).__module__, reduced)
            return
        function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        self._emit("object", type(obj).__qualname__.encode())
        self.add(function)
        self.add(arguments)
        self.add(state)
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
    bytearray: bytes,
    type(Ellipsis): lambda _: b"",
    type(NotImplemented): lambda _: b"",
    torch.dtype: lambda value: str(value).encode(),
    torch.device: lambda value: str(value).encode(),
    torch.Size: lambda value: repr(tuple(value)).encode(),
    types.BuiltinFunctionType: lambda value: f"{value.__module__}:{value.__qualname__}".encode(),
}


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a table entry over a storage says all there is to say about ``tensor``.

    Others (sparse, quantised, subclasses, conjugate views, tensors with attributes of their own) go the way of
    torch's own pickling, which comes down to storages and plain tensors again.
    """
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.__dict__
        and not tensor._backward_hooks
    )


def storage_key(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """Key that is equal for two storages exactly if they are the same memory."""
    if storage.nbytes() == 0:
        return ("empty", storage._cdata)
    return (str(storage.device), storage.data_ptr(), storage.nbytes())


def is_importable(obj: Any) -> bool:
    """Whether another process finds ``obj`` by importing its module (else it must travel by value)."""
    module = getattr(obj, "__module__", None)
    if module is None or module == "__main__" or module not in sys.modules:
        return False
    found: Any = sys.modules[module]
    for name in obj.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is obj


_CLASS_CODE: dict[type, bytes] = {}


def class_code(cls: type) -> bytes:
    """SHA-256 of the compiled code of the functions that ``cls`` itself defines."""
    cached = _CLASS_CODE.get(cls)
    if cached is not None:
        return cached
    total = hashlib.sha256()
    for name, value in sorted(vars(cls).items()):
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,)
        for part in parts:
            code = getattr(part, "__code__", None)
            if isinstance(code, types.CodeType):
                total.update(name.encode() + b"\0" + code_digest(code))
    # Only importable classes keep their code for good; those of __main__ may be patched between two puts.
    if is_importable(cls):
        _CLASS_CODE[cls] = total.digest()
    return total.digest()


def code_digest(code: types.CodeType) -> bytes:
    """SHA-256 of a code object without file names and line numbers; constant sets are sorted."""
    total = hashlib.sha256(code.co_code)
    total.update(
        repr(
            (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags, code.co_argcount, code.co_exceptiontable)
        ).encode()
    )
    for constant in code.co_consts:
        total.update(_constant(constant))
    return total.digest()


def _constant(value: Any) -> bytes:
    if isinstance(value, types.CodeType):
        return code_digest(value)
    if isinstance(value, frozenset):
        return b"{" + b"".join(sorted(_constant(item) for item in value)) + b"}"
    if isinstance(value, tuple):
        return b"(" + b"".join(_constant(item) for item in value) + b")"
    return hashlib.sha256(f"{type(value).__name__}:{value!r}".encode()).digest()


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
