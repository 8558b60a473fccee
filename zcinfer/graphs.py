"""Modules of FX, put together again: torch keeps their code and traces it anew.

Tracing computes at once what depends on no input, as the tracer of `make_fx` does with weights: parameters become
constants, under other keys of the state. Not for exported programs (`programs`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode


def new_graph(
    function: Callable[..., Any], arguments: tuple[dict[str, Any], Any], names: tuple[str, ...] = ()
) -> torch.nn.Module:
    """A module of FX with all that it had, whose graph has nodes of these names."""
    attributes, *others = arguments
    graph: Any = function(dict(attributes), *others)
    if graph._code != attributes["_code"]:
        graph = function(attributes | {"_tracer_cls": _tracer(names)}, *others)
        graph.graph._tracer_cls = attributes.get("_tracer_cls")
    if graph._code == attributes["_code"]:
        vars(graph).update(attributes)
        graph.graph._tracer_cls = attributes.get("_tracer_cls")
    else:  # what torch has computed all the same is no part of the state
        graph._non_persistent_buffers_set |= graph._buffers.keys() - attributes["_buffers"].keys()
    module: torch.nn.Module = graph
    return module


def _tracer(names: tuple[str, ...]) -> type[fx.Tracer]:
    """A tracer that computes nothing, and gives nodes these names, one after the other."""
    left = iter(names)

    class Tracer(fx.Tracer):
        proxy_buffer_attributes = True

        def create_node(
            self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
        ) -> fx.Node:
            return super().create_node(kind, target, args, kwargs, next(left, name), type_expr)

        def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
            with _Recorded(self):
                return super().trace(root, concrete_args)

    return Tracer


class _Recorded(TorchFunctionMode):
    """Operators become nodes whatever their arguments are: those that make a tensor have no proxy among them."""

    def __init__(self, tracer: fx.Tracer):
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(function, OpOverload):
            return self._tracer.create_proxy("call_function", function, args, kwargs or {})
        return function(*args, **(kwargs or {}))
