"""Which of a model's outputs is wanted, and whether it has rows. Not for inputs (`rows`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .errors import OutputError
from .rows import Rows, to_numpy
from .store import ModelRef


class OutputFunctionError(Exception):
    """The user's output function failed. Not for users: a run without weights may fail where a real one does not."""

    def __init__(self, function: Callable[..., Any], error: Exception):
        name = getattr(function, "__qualname__", repr(function))
        super().__init__(
            f"the output function {name} failed: {type(error).__name__}: {error}. It gets (output, inputs)"
        )


Output = str | int | Callable[[Any, Any], torch.Tensor] | None


def choose(output: Any, which: Output, inputs: Any) -> torch.Tensor:
    chosen: Any
    if callable(which):
        try:
            chosen = which(output, inputs)
        except Exception as error:
            raise OutputFunctionError(which, error) from error
    elif isinstance(which, str):
        chosen = output.get(which) if isinstance(output, Mapping) else getattr(output, which, None)
        if chosen is None:
            raise OutputError(f"the model gives no output {which!r}: it gives {_outputs(output)}")
    elif isinstance(which, int):
        try:
            chosen = output[which]
        except (IndexError, KeyError, TypeError):
            raise OutputError(f"the model gives no output {which}: it gives {_outputs(output)}") from None
    elif isinstance(output, torch.Tensor):
        chosen = output
    else:
        tensors = [value for value in _items(output).values() if isinstance(value, torch.Tensor)]
        if len(tensors) != 1:
            raise OutputError(
                f"the model gives {_outputs(output)}: say which, with output=NAME, POSITION or a function"
            )
        chosen = tensors[0]
    if not isinstance(chosen, torch.Tensor):
        raise OutputError(f"the chosen output is a {type(chosen).__name__}, not a tensor")
    return chosen


def _items(output: Any) -> dict[Any, Any]:
    if isinstance(output, Mapping):
        return dict(output.items())
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    return dict(vars(output)) if hasattr(output, "__dict__") else {}


def _outputs(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return f"one tensor of shape {tuple(output.shape)}"
    found = [f"{k!r} {tuple(v.shape)}" for k, v in _items(output).items() if isinstance(v, torch.Tensor)]
    return ", ".join(found) or f"a {type(output).__name__} without tensors"


def rows_axis(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], rows: tuple[int, int], ref: ModelRef) -> Rows:
    (first, dtype), (second, _) = shapes
    if rows[0] == 1 and first == second[1:]:
        first = (1, *first)  # squeezed away by the model, with axes that it means to
    if not first or (first[0], second[0]) != rows or first[1:] != second[1:]:
        raise OutputError(
            f"the output of {ref} has no row axis: {rows[0]} rows give shape {first}, {rows[1]} give {second}, "
            "expected (rows, ...). Choose or shape it with output=f(output, inputs)."
        )
    return Rows(first[1:], to_numpy(torch.empty(0, dtype=dtype)).dtype)
