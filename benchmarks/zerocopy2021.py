"""The method of 2021, written from its description: a module's tensors as a list of dicts of NumPy arrays in Plasma.

"How to Load Deep Learning Models 300 Times Faster with Ray" (Reiss, 2021). What it gets wrong on today's models is in
``docs/decisions.md``; here it is as it was, for the clock.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

Arrays = list[dict[str, dict[str, "np.ndarray[Any, Any]"]]]


def extract(model: nn.Module) -> tuple[nn.Module, Arrays]:
    """A copy of the model without tensors, and for each of its modules the arrays of its parameters and buffers."""
    arrays: Arrays = [
        {
            "params": {name: p.detach().clone().numpy() for name, p in module.named_parameters(recurse=False)},
            "buffers": {name: b.detach().clone().numpy() for name, b in module.named_buffers(recurse=False)},
        }
        for module in model.modules()
    ]
    skeleton = copy.deepcopy(model)
    for module in skeleton.modules():
        for name in [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]:
            setattr(module, name, None)
    return skeleton.train(False), arrays


def replace(skeleton: nn.Module, arrays: Arrays) -> nn.Module:
    """Put the arrays back: as parameters and buffers, registered."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arrays that are not writable
        for module, tensors in zip(skeleton.modules(), arrays, strict=True):
            for name, array in tensors["params"].items():
                module.register_parameter(name, nn.Parameter(torch.as_tensor(array), requires_grad=False))
            for name, array in tensors["buffers"].items():
                module.register_buffer(name, torch.as_tensor(array))
    return skeleton


def replace_directly(skeleton: nn.Module, arrays: Arrays) -> nn.Module:
    """Put the arrays back: set as plain tensors, past the checks of ``register_parameter``."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, tensors in zip(skeleton.modules(), arrays, strict=True):
            for name, array in tensors["params"].items():
                module._parameters[name] = torch.as_tensor(array)  # type: ignore[assignment]
            for name, array in tensors["buffers"].items():
                module.register_buffer(name, torch.as_tensor(array))
    return skeleton
