"""The digest of a model: equal content gives equal digests, in every process.

Pickle bytes cannot serve: sets come in another order with another PYTHONHASHSEED, classes of ``__main__`` carry
random tracker ids, and memo references depend on object identity. So the object graph is walked here in its own
order and fed to a hash. Not for storage: nothing is ever rebuilt from what this module writes.

Classes and functions count by qualified name and by a hash of their compiled code (so a changed ``forward`` is a
new version); those that travel by value, as classes of ``__main__`` do, also by their other members and by the globals
they use. Code is compared as bytecode: digests agree between processes of one Python minor version.
"""

from __future__ import annotations

import hashlib
import struct
import types
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from .bytecode import ATOMS, class_code, code_digest, global_names, home_of, is_filled, is_importable, member_code
from .description import sha256_each
from .pickling import HOOKS, is_plain, reduce, shared_bytes, storage_bytes, storage_key
from .programs import is_program, program_bytes, program_digest

# Of a class's namespace: what the interpreter adds by itself, or what changes without changing behaviour.
_INCIDENTAL = frozenset(
    {
        *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__slotnames__", "__abstractmethods__"),
        *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__type_params__"),
        *("__static_attributes__", "__firstlineno__", "__parameters__", "__orig_bases__", "_abc_impl"),
        *("__dataclass_fields__", "__dataclass_params__"),
    }
)

# What torch's compiler leaves on the tensors and modules that it has met. The copy has it too, but a model that was
# compiled is no other model. (What users say with `mark_static` has other names, and counts; `mark_static_address`
# leaves the compiler's own mark. On a subclass of Parameter a mark counts: torch then makes it by another function.)
_MARKS = frozenset({"_dynamo_static_input_type", "_dynamo_propagated_dynamic_indices", "_is_torch_compile"})

# Where a wrapper keeps what its last call found out. By name: to import it takes seconds.
_BOX = "torch._dynamo.convert_frame", "ConvertFrameBox"

# Each level multiplies the walks; objects that know one another through sets would take for ever.
_MOST_NESTED_SETS = 4

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


class Canonical:
    """Walk of one object graph, feeding a SHA-256.

    Parameters
    ----------
    storage_digest : callable, optional
        Gives the content digest (bytes) of a ``torch.UntypedStorage``, where it is known already.
    program_bytes : callable
        Gives the bytes of a program, where they are known already.
    under_tensors : set of int
        Ids of small arrays that tensors lie over.

    Attributes
    ----------
    packages : set of str
        Top-level packages whose classes or functions were met by reference.
    met : list
        All objects walked so far, and some that were made for it.
    """

    def __init__(
        self,
        storage_digest: Callable[[torch.UntypedStorage], bytes] | None = None,
        program_bytes: Callable[[Any], bytes] = program_bytes,
        under_tensors: Collection[int] = (),
    ):
        self.packages: set[str] = set()
        self.met: list[Any] = []  # keeps ids valid while the walk lasts
        self._storage_digest = storage_digest or content_digest
        self._program_bytes = program_bytes
        self._under_tensors = under_tensors
        self._hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._storages: dict[tuple[Any, ...], int] = {}
        self._hooks: dict[int, int] = {}  # numbers of hooks in this walk, by torch's
        self._hook_dicts: set[int] = set()
        self._names: dict[int, str] = {}  # of modules and parameters in the first module met
        self._depth = 0  # of sets within sets

    def hexdigest(self) -> str:
        """Hexadecimal SHA-256 of everything walked so far."""
        return self._hash.hexdigest()

    def has_met(self, obj: Any) -> bool:
        return id(obj) in self._seen

    def has_met_storage(self, storage: torch.UntypedStorage) -> bool:
        return storage_key(storage) in self._storages

    def add(self, obj: Any) -> None:
        """Feed ``obj`` and all it refers to."""
        kind = type(obj)
        atom = ATOMS.get(kind)
        if atom is not None:
            self._emit(kind.__name__, atom(obj))
            return
        if kind in (tuple, frozenset) and all(type(item) in ATOMS for item in obj):
            self._collection(obj)  # by value: whether two equal ones are one object is up to the compiler
            return
        if isinstance(obj, np.dtype):
            # By value: NumPy makes and shares them at will.
            self._emit("numpy.dtype", repr(obj.__reduce__()[1:]).encode())
            return
        if kind is types.CellType:
            # By value: cloudpickle gives every function cells of its own.
            self._sequence("cell", [obj.cell_contents] if is_filled(obj) else [])
            return
        number = self._seen.get(id(obj))
        if number is not None:
            self._emit("again", str(number).encode())
            return
        self._seen[id(obj)] = len(self._seen)
        self.met.append(obj)
        if id(obj) in self._hook_dicts:
            self._sequence("hooks", [part for key, hook in obj.items() for part in (self._hook_number(key), hook)])
        elif kind in (tuple, list, set, frozenset, weakref.WeakSet):
            self._collection(obj)
        elif kind is dict:
            self._sequence("dict", [part for item in obj.items() for part in item])
        elif isinstance(obj, torch.Tensor) and is_plain(obj):
            self._tensor(obj)
        elif isinstance(obj, np.ndarray) and (flat := shared_bytes(obj, id(obj) in self._under_tensors)) is not None:
            layout = (obj.dtype.__reduce__()[1:], obj.shape, obj.strides, obj.flags.writeable)
            self._emit("array", repr(layout).encode())
            self._storage(flat.untyped_storage())
        elif is_program(obj):
            self._emit("program", program_digest(obj, self._program_bytes(obj)))
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
        elif (kind.__module__, kind.__qualname__) == _BOX:
            self._emit("object", kind.__qualname__.encode())
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
        known = [item for item in others if type(item) in ATOMS or id(item) in self._seen]
        new = [item for item in others if type(item) not in ATOMS and id(item) not in self._seen]
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
        attributes = _without_marks(tensor.__dict__)
        if attributes:
            self._sequence("attributes", [attributes])

    def _storage(self, storage: torch.UntypedStorage) -> None:
        self.met.append(storage)
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
        for name in sorted(global_names(function.__code__) & function.__globals__.keys()):
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
        self.met.append(reduced)
        if isinstance(reduced, str):
            self._reference("global", getattr(obj, "__module__", None) or type(obj).__module__, reduced)
            self._emit("code", member_code(obj))
            return
        function, arguments, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
        if isinstance(obj, torch.nn.Module):
            state = _unmarked(state)
        if isinstance(obj, set | frozenset):
            arguments = [frozenset(part) if isinstance(part, list) else part for part in arguments]
        self._emit("object", type(obj).__qualname__.encode())
        for part in (function, arguments, state, setter):
            self.add(part)
        self._sequence("items", items or ())
        self._sequence("pairs", [part for pair in pairs or () for part in pair])


def _unmarked(state: Any) -> Any:
    """State of a module: its attributes, or a tuple of these and what is in its slots."""
    if type(state) is tuple:
        return tuple(_unmarked(part) for part in state)
    return _without_marks(state) if type(state) is dict else state


def content_digest(storage: torch.UntypedStorage) -> bytes:
    """SHA-256 of the bytes of a storage, as a description has it."""
    return sha256_each([storage_bytes(storage)])[0]


def _without_marks(attributes: dict[str, Any]) -> dict[str, Any]:
    if _MARKS.isdisjoint(attributes):
        return attributes
    return {name: value for name, value in attributes.items() if name not in _MARKS}


def _names_in(model: torch.nn.Module) -> dict[int, str]:
    # Torch's own methods: models override them, also with fewer arguments.
    parts = [*torch.nn.Module.named_modules(model), *torch.nn.Module.named_parameters(model)]
    return {id(part): name for name, part in parts}
