"""What the code of a class or function is, as a digest, and whether another process finds it by importing it.

Compiled code, without file names and line numbers: digests agree between processes of one Python minor version. Not
for what else a class has: `canonical` walks that.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import os
import struct
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ExtensionFileLoader
from typing import Any, TypeVar

import torch

try:
    import cloudpickle
except ImportError:
    cloudpickle = None

# What is told by its value alone, with bytes that say it.
ATOMS: dict[type, Callable[[Any], bytes]] = {
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

# Programs have a main module each, and Hugging Face's packages keep the code that comes with a model in a cache.
_OF_THIS_PROCESS = ("__main__", "__mp_main__", "transformers_modules", "diffusers_modules")


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
    return is_found(module) and not (
        cloudpickle is not None
        and any(f"{module}.".startswith(f"{name}.") for name in cloudpickle.list_registry_pickle_by_value())
    )


def is_found(module: str) -> bool:
    """Whether another process finds a module of this one: not where code made it, or where it was fetched with a model.

    A module that is an attribute of its parent came with that, or was imported as a part of it.
    """
    if getattr(_rule, "by_name", False):
        return module != "__main__"
    parent, _, child = module.rpartition(".")
    if not parent:
        return module not in _OF_THIS_PROCESS and _can_be_found(module)
    above, here = sys.modules.get(parent), sys.modules.get(module)
    attached = here is not None and getattr(above, child, None) is here
    return is_found(parent) and (attached or _can_be_found(module, tuple(getattr(above, "__path__", ()))))


_findable: set[tuple[str, int]] = set()


def _can_be_found(module: str, path: tuple[str, ...] | None = None) -> bool:
    """Whether Python finds it, and not another of the same name, where it looks for modules."""
    here: Any = sys.modules.get(module)
    key = module, id(here)
    if key not in _findable:
        for finder in sys.meta_path:  # not importlib.util.find_spec, which believes sys.modules
            with suppress(Exception):  # anybody's
                spec = finder.find_spec(module, path)
                if spec is not None:
                    same = spec.origin == getattr(getattr(here, "__spec__", None), "origin", "")
                    if here is None or same or _lies_in(here, path or sys.path):
                        _findable.add(key)
                    break
    return key in _findable


def _lies_in(module: types.ModuleType, path: Iterable[str]) -> bool:
    """Whether a module's file is in one of these directories, though perhaps not the first of its name there."""
    file = os.path.realpath(getattr(module, "__file__", None) or os.devnull)
    if hasattr(module, "__path__"):
        file = os.path.dirname(file)
    return os.path.dirname(file) in map(os.path.realpath, path)


_rule = threading.local()


@contextmanager
def by_name() -> Iterator[None]:
    """Meanwhile all modules but ``__main__`` are found: where what they have cannot travel."""
    _rule.by_name = True
    try:
        yield
    finally:
        _rule.by_name = False


def is_left_behind(obj: Any) -> bool:
    """Whether pickles take a class or function for one that other processes find, and it is none.

    Those of ``__main__`` they know; those of a compiled extension have no code that could travel.
    """
    if not isinstance(obj, type | types.FunctionType | TypeVar):
        return False
    module = getattr(obj, "__module__", None)
    if not isinstance(module, str) or module == "__main__" or module not in sys.modules:
        return False
    loader = getattr(getattr(sys.modules[module], "__spec__", None), "loader", None)
    return not isinstance(loader, ExtensionFileLoader) and not is_found(module)


@functools.cache
def class_code(cls: type) -> bytes:
    """SHA-256 of the compiled code of the functions that an importable ``cls`` itself defines."""
    total = hashlib.sha256()
    for name, value in sorted(vars(cls).items()):
        code = member_code(value)
        if code and not _is_put_there(value, cls):
            total.update(name.encode() + b"\0" + code)
    return total.digest()


def _is_put_there(value: Any, cls: type) -> bool:
    """Whether somebody has put a member into torch's own class, as transformers does while it builds a model."""
    home = getattr(value, "__module__", None) or ""
    return cls is torch.nn.Module and isinstance(value, types.FunctionType) and home.partition(".")[0] != "torch"


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
        cells = [cell.cell_contents for cell in value.__closure__ or () if is_filled(cell)]
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
    content = repr(value) if type(value) in ATOMS or isinstance(value, slice) else ""
    return hashlib.sha256(f"{type(value).__name__}:{content}".encode("utf-8", "surrogatepass")).digest()


def global_names(code: types.CodeType, kind: str = "GLOBAL") -> set[str]:
    """Names that a code uses as global ones; with "STORE_GLOBAL" those that it assigns to."""
    # Not co_names, which has the names of attributes as well.
    names = {step.argval for step in dis.get_instructions(code) if kind in step.opname}
    within = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names.union(*(global_names(constant, kind) for constant in within))


def is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
