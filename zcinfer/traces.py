"""Modules whose calls have frames that bear their names, so that a trace tells which of a model's modules ran.

faulthandler knows functions and lines, and of a model with forty LayerNorms no more than that one of them ran. Only for
processes in which a write to weights ends in its trace (`sharing`): elsewhere nothing of torch is changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

_Call = Callable[..., Any]
# By id, as nothing of the module then decides, with what tells that the id has become another's.
_named: dict[int, tuple[weakref.ref[nn.Module], _Call]] = {}
_torchs_call: _Call | None = None


def name_frames(model: nn.Module, title: str) -> None:
    """Have each call of a module of ``model`` pass through a function that is named after it.

    Parameters
    ----------
    model : torch.nn.Module
        Not changed; copies of it do without.
    title : str
        What the model is called.
    """
    global _torchs_call
    for path, module in model.named_modules():
        name = f"{path} of {title}" if path else title
        frame = FunctionType(_code(f"{name} ({type(module).__name__})"), {})
        _named[id(module)] = weakref.ref(module, partial(_forget, id(module))), frame
    if _torchs_call is None:
        _torchs_call, nn.Module.__call__ = nn.Module.__call__, _call  # type: ignore[method-assign]


def _forget(number: int, _: object) -> None:
    _named.pop(number, None)


def _code(name: str) -> CodeType:
    return _frame.__code__.replace(co_name=name, co_qualname=name)


def _frame(call: _Call, module: nn.Module, arguments: Any, keywords: Any) -> Any:
    return call(module, *arguments, **keywords)


def _call(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    assert _torchs_call is not None
    # torch.compile reads what it compiles, and would not understand this.
    found = None if torch.compiler.is_compiling() else _named.get(id(self))
    if found is None or found[0]() is not self:
        return _torchs_call(self, *arguments, **keywords)
    return found[1](_torchs_call, self, arguments, keywords)
