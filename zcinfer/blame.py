"""Where in a model a thing is, and which attribute it is that cannot be taken apart: for messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def blame(model: torch.nn.Module, error: Exception, attempt: Callable[[Any], object]) -> str:
    """Say which attribute it is: the deepest one with which the attempt fails alone."""
    if any(
        isinstance(m, torch.fx.GraphModule) and hasattr(m, "validate_inputs") for m in torch.nn.Module.modules(model)
    ):
        return (
            "the module of an exported program cannot be taken apart: publish the program itself, which "
            "torch.export.export or torch.export.load has returned"
        )
    if isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError):
        return f"{type(model).__name__} nests too deeply for pickle: raise sys.setrecursionlimit before publishing"
    path, culprit = _deepest_failure(type(model).__name__, model, attempt, set())
    hint = "Remove it before publishing, or give its class a __getstate__ that leaves it out."
    return f"{path} ({_kind(culprit)}) cannot be taken apart: {error}. {hint}"


def _deepest_failure(path: str, obj: Any, attempt: Callable[[Any], object], seen: set[int]) -> tuple[str, Any]:
    seen.add(id(obj))
    for name, child in _children(path, obj):
        if id(child) in seen:
            continue
        try:
            attempt(child)
        except Exception:
            return _deepest_failure(name, child, attempt, seen)
    return path, obj


def place_of(wanted: Any, model: Any) -> str:
    """Path of the first attribute that is ``wanted``, or its type alone where it lies deeper than attributes do."""
    kind = _kind(wanted)
    waiting, seen = [(type(model).__name__, model)], {id(model)}
    while waiting:
        path, obj = waiting.pop(0)
        if obj is wanted:
            return f"{path} ({kind})"
        for name, child in _children(path, obj):
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append((name, child))
    return kind


def _kind(obj: Any) -> str:
    name = type(obj).__name__
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"


def _children(path: str, obj: Any) -> list[tuple[str, Any]]:
    children: list[tuple[str, Any]] = []
    if isinstance(obj, torch.nn.Module):
        state = dict(vars(obj))
        for registry in ("_modules", "_parameters", "_buffers"):
            children += [(f"{path}.{name}", child) for name, child in state.pop(registry, {}).items()]
        children += [(f"{path}.{name}", child) for name, child in state.items()]
    elif isinstance(obj, dict):
        children = [(f"{path}[{name!r}]", child) for name, child in obj.items()]
    elif isinstance(obj, list | tuple | set):
        children = [(f"{path}[{number}]", child) for number, child in enumerate(obj)]
    elif hasattr(obj, "__dict__") and not isinstance(obj, type):
        children = [(f"{path}.{name}", child) for name, child in vars(obj).items()]
    return children
