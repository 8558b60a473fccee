"""How a model is called on one batch: prepare, forward, choose the outputs, back to NumPy. Not for cutting batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import numpy as np
import torch

from .errors import InputError, OutputError, SettingsError
from .outputs import Output, choose
from .rows import Array, Rows, to_numpy

AUTOCAST = ("bfloat16", "float16")

# Gives the chosen outputs of the tensors of a batch, the last of which have names
Function = Callable[[Sequence[torch.Tensor], tuple[str, ...]], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Call:
    """How a model is called.

    Attributes
    ----------
    method : str
        Method of the model.
    output : str, int, callable, or a sequence of them
        Which outputs.
    preprocess, postprocess : callable, optional
        Functions of NumPy rows, before the model and after it.
    autocast : str, optional
        Name of torch's dtype for operators that can do with less precision.
    dtype : str, optional
        Of floating outputs.
    constants : dict
        Passed to the model as they are.
    """

    method: str = "forward"
    output: Output | Sequence[Output] = None
    preprocess: Callable[..., Any] | None = None
    postprocess: Callable[..., Any] | None = None
    autocast: str | None = None
    dtype: str | None = None
    constants: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.autocast is not None and self.autocast not in AUTOCAST:
            raise SettingsError(f"autocast is {self.autocast!r}: choose one of {', '.join(AUTOCAST)}")
        if self.dtype is not None:
            try:
                kind = np.dtype(self.dtype).kind
            except TypeError as error:
                raise SettingsError(f"dtype is {self.dtype!r}: name one of NumPy's, as 'float16'") from error
            if kind != "f":
                raise SettingsError(f"dtype is {self.dtype!r}: floating outputs can become another floating dtype only")
        if isinstance(self.output, Sequence) and not isinstance(self.output, str) and not self.output:
            raise SettingsError("output is an empty list: name one output or more")

    @property
    def several(self) -> bool:
        """Whether several outputs of the model are asked for."""
        return isinstance(self.output, Sequence) and not isinstance(self.output, str)

    @property
    def is_fixed(self) -> bool:
        """Whether it is the same call as long as it lives: without functions and constants."""
        functions = (self.preprocess, self.postprocess)
        return functions == (None, None) and not self.constants and type(self.output) in (str, int, NoneType)

    @property
    def is_plain(self) -> bool:
        """Whether it is ``model(rows)``, and its only output is what comes out."""
        return self == _PLAIN

    def prepare(self, blocks: Sequence[Array], keywords: tuple[str, ...]) -> tuple[list[Array], tuple[str, ...]]:
        """Rows as the model gets them, and the names of the last of them.

        Parameters
        ----------
        blocks : sequence of numpy.ndarray
            ``(rows, ...)``: positional ones first, then those of ``keywords``.
        """
        if self.preprocess is None:
            return list(blocks), keywords
        positional = len(blocks) - len(keywords)
        made = self.preprocess(*blocks[:positional], **dict(zip(keywords, blocks[positional:], strict=True)))
        names: tuple[str, ...] = ()
        if isinstance(made, Mapping):
            names, made = tuple(map(str, made)), tuple(made.values())
        prepared = list(made) if isinstance(made, tuple | list) else [made]
        for array in prepared:
            if not isinstance(array, np.ndarray):
                raise InputError(
                    f"preprocess gives a {type(array).__name__}: it must give a NumPy array of rows, a tuple of them, "
                    "or a dict of them by the model's names"
                )
            if array.shape[:1] != blocks[0].shape[:1]:
                raise InputError(
                    f"preprocess made shape {array.shape} of {len(blocks[0])} rows: it must give a row for each row"
                )
        return prepared, names

    def on(self, model: torch.nn.Module, keep_casts: bool = True) -> Function:
        """The call of that model, for one batch after the other: the chosen outputs of tensors, the last by name.

        ``keep_casts``: whether autocast may cast weights once a call, and not in each operator that they go into.
        """
        function = model if self.method == "forward" else getattr(model, self.method, None)
        if not callable(function):
            raise SettingsError(f"{type(model).__name__} has no method {self.method!r}")
        call: Callable[..., Any] = function
        wanted: Any = self.output if self.several else [self.output]
        constants = self.constants
        autocast = getattr(torch, self.autocast) if self.autocast else None

        def run(tensors: Sequence[torch.Tensor], keywords: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
            positional = tensors[: len(tensors) - len(keywords)]
            named = dict(zip(keywords, tensors[len(positional) :], strict=True)) if keywords else {}
            if autocast is None:
                output = call(*positional, **named, **constants)
            else:
                with torch.autocast(tensors[0].device.type, autocast, cache_enabled=keep_casts):
                    output = call(*positional, **named, **constants)
            inputs: Any = {**dict(enumerate(positional)), **named} if named else tuple(tensors)
            return tuple([choose(output, which, inputs) for which in wanted])

        return run

    def finish(self, outputs: Sequence[Array]) -> tuple[Array, ...] | Array:
        """Outputs as they go out: a tuple of arrays where there are several."""
        if self.postprocess is None:
            made: Any = tuple(outputs) if self.several else outputs[0]
        else:
            made = self.postprocess(*outputs)
            for array in made if isinstance(made, tuple) else (made,):
                if not isinstance(array, np.ndarray):
                    raise OutputError(
                        f"postprocess gives a {type(array).__name__}: it must give a NumPy array of rows, or a tuple "
                        "of them"
                    )
        return tuple(map(self._as_asked, made)) if isinstance(made, tuple) else self._as_asked(made)

    def _as_asked(self, array: Array) -> Array:
        return array.astype(self.dtype, copy=False) if self.dtype is not None and array.dtype.kind == "f" else array


_PLAIN = Call()


def restore(output: torch.Tensor, rows: int, expected: Rows, trimmed: tuple[int, int] | None = None) -> Array:
    """An output as NumPy, with the row axis that models squeeze away, and the positions that were trimmed, put back.

    Parameters
    ----------
    output : torch.Tensor
    rows : int
        Of the batch.
    expected : Rows
    trimmed : tuple of int, optional
        The length that inputs were cut to along axis 1, and the one that they had. Positions after it are zero.
    """
    array = to_numpy(output)
    if rows == 1 and array.shape == expected.shape:
        array = array[None]  # squeezed away by the model, with axes that it means to
    if trimmed is not None and array.ndim > 1 and (array.shape[1], *expected.shape[:1]) == trimmed != trimmed[::-1]:
        whole = np.zeros((len(array), trimmed[1], *array.shape[2:]), array.dtype)
        whole[:, : trimmed[0]] = array
        return whole
    return array


def put_in_place(
    output: torch.Tensor, place: torch.Tensor, expected: Rows, trimmed: tuple[int, int] | None = None
) -> None:
    """Copy an output to its place on the device, with the row axis and the positions that `restore` puts back.

    Parameters
    ----------
    output : torch.Tensor
    place : torch.Tensor
        ``(rows, ...)``, of the dtype in which it goes to the host.
    expected : Rows
    trimmed : tuple of int, optional
        The length that inputs were cut to along axis 1, and the one that they had.

    Raises
    ------
    OutputError
        It has another shape. (``copy_`` would broadcast it.)
    """
    if output.layout is not torch.strided:
        output = output.to_dense()
    if len(place) == 1 and tuple(output.shape) == expected.shape:
        output = output[None]
    if trimmed is not None and output.ndim > 1 and (output.shape[1], *expected.shape[:1]) == trimmed != trimmed[::-1]:
        place[:, trimmed[0] :].zero_()
        place = place[:, : trimmed[0]]
    if output.shape != place.shape:
        raise OutputError(
            f"the output has shape {tuple(output.shape)}, expected ({len(place)}, ...) as {expected}, found before the "
            "job began"
        )
    place.copy_(output)
