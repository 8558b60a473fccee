"""What runs a module's operators: torch as it is, CUDA graphs, or code that torch has compiled.

A resident's module stays what it is, since others may borrow it with another engine; what was made of it is kept
beside it, and ends with it (`loading.made_of`). Not for how graphs are captured (`captures`).
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from .calling import Call, Function
from .canonical import Canonical
from .captures import Captured
from .errors import SettingsError
from .loading import made_of
from .probing import explain
from .store import ModelRef

ENGINES = ("eager", "graph", "compile")
# Ways to call one module for which graphs are kept: each holds memory of the device.
_CALLS = 4


def check(engine: str, device: str | None) -> None:
    """Refuse what cannot be, where it is asked for: it may run on another machine.

    Raises
    ------
    SettingsError

    Examples
    --------
    >>> check("graph", "cpu")
    Traceback (most recent call last):
        ...
    zcinfer.errors.SettingsError: engine='graph' needs a GPU, and the model is to run on cpu: use engine='eager'
    """
    if engine not in ENGINES:
        raise SettingsError(f"engine is {engine!r}: choose one of {', '.join(ENGINES)}")
    if device is not None:
        check_device(engine, torch.device(device))


def check_device(engine: str, device: torch.device) -> None:
    """Refuse an engine that cannot work there.

    Raises
    ------
    SettingsError
    """
    if engine == "graph" and device.type != "cuda":
        raise SettingsError(f"engine='graph' needs a GPU, and the model is to run on {device}: use engine='eager'")


def module_of(engine: str, model: torch.nn.Module, method: str, device: torch.device) -> Any:
    """The module that is called in place of a resident's.

    Raises
    ------
    SettingsError
        There is no compiler.
    """
    if engine != "compile":
        return model
    made = made_of(model)
    if ("compile", method) not in made:
        lacking = no_compiler(device.type)
        if lacking:
            raise SettingsError(f"engine='compile' needs a compiler on each worker's machine: {lacking}")
        function: Any = model if method == "forward" else getattr(model, method, None)
        if not callable(function):
            raise SettingsError(f"{type(model).__name__} has no method {method!r}")
        compiled: Any = torch.compile(function)
        vars(model).pop("_is_torch_compile", None)  # torch's mark, which others who borrow the module would find
        made["compile", method] = compiled if method == "forward" else SimpleNamespace(**{method: compiled})
    return made["compile", method]


def function_of(engine: str, model: torch.nn.Module, call: Call, ref: ModelRef, device: torch.device) -> Function:
    """The call of a resident's module by an engine, on a GPU."""
    if engine != "graph":
        return call.on(module_of(engine, model, call.method, device))
    made = made_of(model)
    key = "graph", _digest(call)
    if key not in made:
        graphs = [old for old in made if old[0] == "graph"]
        if len(graphs) >= _CALLS:
            del made[graphs[0]]
        made[key] = Captured(call.on(model, keep_casts=False), str(ref))
    function: Function = made[key]
    return function


def _digest(call: Call) -> str:
    if call.is_plain:
        return ""
    canonical = Canonical()
    canonical.add(vars(call))
    return canonical.hexdigest()


@cache
def no_compiler(kind: str) -> str:
    """Why torch cannot compile for a kind of device, and what to do; "" if it can."""
    if kind == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "triton is not there, or not for this GPU. pip install triton, or engine='eager'"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:
        return ""  # another torch; it says itself what it lacks
    try:
        get_cpp_compiler()
    except Exception as error:
        return f"{explain(error)}. Install one (Debian: g++), name it in CXX, or use engine='eager'"
    return ""
