"""How much of a device's memory the models that a process keeps may take, and how it is given back.

Not for batches (`tuning`).
"""

from __future__ import annotations

import gc
import threading

import torch

from . import config

# CUDA captures one graph at a time in a process, and torch's allocator gives nothing back meanwhile: asked to, by any
# thread, it raises an internal error
capturing = threading.RLock()


def budget(device: torch.device, held: int) -> float:
    """Bytes that the models of this process may take on a device, by what is free there now.

    Parameters
    ----------
    device : torch.device
    held : int
        Bytes that they take already.

    Returns
    -------
    float
        The share ``zcinfer.gpu.residents`` of what they take and what is free, divided by the processes on that device
        (``zcinfer.jobs``). Infinite where a device is no CUDA device: host memory is the store's.

    Examples
    --------
    >>> budget(torch.device("cpu"), 0)
    inf
    """
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    # Torch keeps what was freed for the next that asks
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(config.get("gpu.residents")) * (free + cached + held) / max(1, int(config.get("jobs")))


def give_back(device: torch.device) -> None:
    """Let other processes have the memory of what was just dropped."""
    if device.type == "cuda":
        gc.collect()  # modules may refer to each other in circles
        empty_cache(device)


def empty_cache(device: torch.device) -> None:
    """Have torch give back what it keeps of a device's memory, for who asks beside it."""
    if device.type == "cuda":
        with capturing:
            torch.cuda.empty_cache()
