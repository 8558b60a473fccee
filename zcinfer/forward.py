"""One batch through a model: NumPy rows in, NumPy rows out. What is done for every batch, so that it is kept short.

Not for which rows a batch has (`batches`), nor for what its outputs' shapes are to be (`binding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from .binding import Binding
from .calling import Call, restore
from .errors import OutputError
from .outputs import choose
from .rows import Array, Rows, to_numpy, to_tensor
from .telemetry import PHASES, Clock

_PREPARING, _TO_DEVICE, _WAITING, _COMPUTING = range(PHASES.index("preparing"), PHASES.index("computing") + 1)


class Forward:
    """A model as a function of one batch.

    Parameters
    ----------
    model : torch.nn.Module
    call : Call
        How it is called.
    binding : Binding
        What was found for its inputs.
    keywords : sequence of str
        Names of the last inputs.
    device : torch.device
        That the model is on.
    clock : Clock
        Told of every phase.
    alone : context manager, optional
        Entered for each batch, while the model computes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        call: Call,
        binding: Binding,
        keywords: tuple[str, ...],
        device: torch.device,
        clock: Clock,
        alone: AbstractContextManager[object] | None,
    ):
        self._function, self._call, self._binding = call.on(model), call, binding
        self._keywords, self._device, self._clock, self._alone = keywords, device, clock, alone or nullcontext()
        # The usual case has few steps: each is code that the processor must fetch anew after a forward.
        usual = call.is_plain and len(binding.casts) == 1 and not keywords and alone is None and device.type == "cpu"
        self._model = model if usual else None

    def __call__(self, batch: Sequence[Array], trimmed: tuple[int, int] | None = None) -> list[Array]:
        """Outputs as they go out.

        Parameters
        ----------
        batch : sequence of numpy.ndarray
            ``(rows, ...)`` each.
        trimmed : tuple of int, optional
            The length that they were cut to along axis 1, and the one that they had.
        """
        binding, clock = self._binding, self._clock
        clock.batches += 1
        if self._model is not None:
            tensor = to_tensor(batch[0], binding.casts[0], self._device)
            clock.lap(_TO_DEVICE)
            output = self._model(tensor)
            clock.lap(_COMPUTING)
            if type(output) is torch.Tensor:
                array = to_numpy(output)
                found = binding.raw[0]
                if array.shape == (len(batch[0]), *found.shape) and array.dtype == found.dtype:
                    return [array]
            return self._finished([choose(output, None, (tensor,))], len(batch[0]), trimmed)
        prepared, names = batch, self._keywords
        if self._call.preprocess is not None:
            prepared, names = self._call.prepare(batch, self._keywords)
            clock.lap(_PREPARING)
        tensors = [to_tensor(a, cast, self._device) for a, cast in zip(prepared, binding.casts, strict=True)]
        clock.lap(_TO_DEVICE)
        with self._alone:
            clock.lap(_WAITING)
            outputs = self._function(tensors, names)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # what comes next waits for it in any case
        clock.lap(_COMPUTING)
        return self._finished(outputs, len(batch[0]), trimmed)

    def _finished(self, outputs: Sequence[torch.Tensor], rows: int, trimmed: tuple[int, int] | None) -> list[Array]:
        """As they go out, of the shapes that were found before the job began."""
        call, binding = self._call, self._binding
        arrays = [restore(output, rows, raw, trimmed) for output, raw in zip(outputs, binding.raw, strict=True)]
        refuse_others(arrays, binding.raw, rows)
        made = call.finish(arrays)
        every = list(made) if isinstance(made, tuple) else [made]
        if call.postprocess is not None:
            refuse_others(every, binding.outputs, rows)
        return every


def refuse_others(arrays: Sequence[Array], expected: Sequence[Rows], rows: int) -> None:
    """Refuse outputs of other shapes than were found, or of a dtype of which that would keep only a part."""
    for array, found in zip(arrays, expected, strict=True):
        if array.shape != (rows, *found.shape):
            raise OutputError(
                f"the output has shape {array.shape}, expected ({rows}, ...) as {found}, found before the job began"
            )
        if not np.can_cast(array.dtype, found.dtype, "same_kind"):
            raise OutputError(f"the output is {array.dtype}, expected {found.dtype}, found before the job began")
