"""CUDA graphs of a model's call: one for each shape of batches that comes again, replayed in place of its operators.

Asking for an operator takes the host some microseconds, and small batches are little more than that. A graph is asked
for once. Not for which models have one (`engines`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from .calling import Function
from .device_memory import capturing
from .lost import STICKY, code_of
from .probing import explain

log = logging.getLogger("zcinfer")

# Graphs that are kept of one call: each holds memory for what the model computes.
MOST = 8
# Runs before a capture, in which libraries choose algorithms and take their memory
_WARM = 3
# Calls of which a graph could not be captured, in this process; a capture that has failed is not tried again, since it
# may have left behind anything
_failed: set[str] = set()
# Graphs whose capture CUDA has cut short: torch's allocator of pinned memory goes on asking them
_cut_short: list[torch.cuda.CUDAGraph] = []
# One a device. With a priority, as no other stream here has: torch hands out 32 streams of a kind and then the same
# ones again, and what another thread asks of the stream of a capture would become part of it, and not be done
_asides: dict[torch.device, torch.cuda.Stream] = {}

Outputs = tuple[torch.Tensor, ...]
# Gives what computes the outputs anew from what then lies in the inputs
Capture = Callable[[Function, Sequence[torch.Tensor], tuple[str, ...]], tuple[Callable[[], object], Outputs]]


class Captured:
    """A model's call, by graphs where it has them. For one thread at a time, as the module is.

    Parameters
    ----------
    function : callable
        The call, of tensors on one device.
    name : str
        Of the model, in messages.
    capture : callable, optional
        Captures a graph. Default: CUDA's.

    Notes
    -----
    A shape has no graph when it comes for the first time: the last, short batch of a block costs no capture. What a
    graph gives is its own memory, and the next replay writes there: copy it before. A graph repeats what the device
    did, and nothing that the module does in Python meanwhile.
    """

    def __init__(self, function: Function, name: str, capture: Capture | None = None):
        self._function, self._name, self._capture = function, name, capture or capture_cuda
        self._graphs: dict[object, tuple[Sequence[torch.Tensor], Callable[[], object], Outputs] | None] = {}

    def __call__(self, tensors: Sequence[torch.Tensor], names: tuple[str, ...]) -> Outputs:
        # By the shape and not by the rows alone: copy_ would broadcast.
        key = (names, *((tensor.shape, tensor.dtype) for tensor in tensors))
        if key not in self._graphs:
            if len(self._graphs) < MOST:
                self._graphs[key] = None
            return self._function(tensors, names)
        found = self._graphs[key]
        if found is None:
            if self._name in _failed:
                return self._function(tensors, names)
            found = self._new(tensors, names)
            if found is None:
                return self._function(tensors, names)
            self._graphs[key] = found
        inputs, replay, outputs = found
        for static, tensor in zip(inputs, tensors, strict=True):
            static.copy_(tensor)
        replay()
        return outputs

    def _new(
        self, tensors: Sequence[torch.Tensor], names: tuple[str, ...]
    ) -> tuple[Sequence[torch.Tensor], Callable[[], object], Outputs] | None:
        """A graph for batches like this one, or None where it cannot be had."""
        with torch.inference_mode(False):  # else they could be written to in that mode alone
            inputs = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        for static, tensor in zip(inputs, tensors, strict=True):
            static.copy_(tensor)
        try:
            with capturing:
                return inputs, *self._capture(self._function, inputs, names)
        except Exception as error:
            if code_of(error) in STICKY:
                raise
            _failed.add(self._name)
            self._graphs = dict.fromkeys(self._graphs)
            log.warning(
                "no CUDA graph of %s could be captured (%s): it runs eagerly in this process. A model with .item(), "
                "with shapes that depend on values, or that copies to the host, can have none: use engine='eager'",
                self._name,
                explain(error),
            )
        return None


def capture_cuda(
    function: Function, inputs: Sequence[torch.Tensor], names: tuple[str, ...]
) -> tuple[Callable[[], object], Outputs]:
    """Capture a graph on a stream of its own. For one thread at a time."""
    device = inputs[0].device
    with torch.cuda.device(device):
        here = torch.cuda.current_stream()
        if device not in _asides:
            _asides[device] = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
        aside = _asides[device]
        aside.wait_stream(here)
        try:
            with torch.cuda.stream(aside):
                for _ in range(_WARM):
                    function(inputs, names)
        finally:
            here.wait_stream(aside)  # it may be at the inputs, which go when this has failed
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # "thread_local": what other threads ask of the device meanwhile is no error.
            with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                outputs = function(inputs, names)
        except BaseException:
            torch.cuda.set_stream(here)  # torch leaves this thread with the other one, where the capture was cut short
            with suppress(RuntimeError):  # else it was ended, and the graph gives its memory back itself
                # Without it no memory is given back in this process any more, and no graph captured
                torch._C._cuda_endAllocateToPool(device.index, pool)
                torch._C._cuda_releasePool(device.index, pool)
                _cut_short.append(graph)
            raise
    return graph.replay, outputs
