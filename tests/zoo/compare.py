"""Two modules compared in all that can be seen: names, ties, modes, hooks, attributes, bits of tensors, outputs.

What a copy is compared with is always torch's own: a model as it was built. Not for digests (`test_canonical`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from zcinfer.parts import Parts, join, split
from zoo.facts import HOOKS, Facts, attributes, differing, facts, filled, in_memory, memory, name_of, named

# What torch's own modules write anew whenever they are pickled: a graph its code, which stays the same to the letter,
# and a recurrent layer what it knows of its list of weights.
BROUGHT_UP_TO_DATE = {"_lineno_map", "_flat_weight_refs"}


def buffer_of(parts: Parts) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytearray(b"".join(parts.pieces())), np.uint8)


def round_trip(model: nn.Module) -> Any:
    parts = split(model)
    return join(parts.skeleton, parts.description, buffer_of(parts))


def lies_in(buffer: np.ndarray[Any, Any], tensor: torch.Tensor) -> bool:
    return buffer.ctypes.data <= tensor.data_ptr() < buffer.ctypes.data + buffer.nbytes


def grouped(keys: list[Any]) -> list[int]:
    """For each key the position of the first that is equal: which of them are one."""
    return [keys.index(key) for key in keys]


def kind_of(module: nn.Module) -> str:
    # Torch's loader makes one class of all that was scripted, traced or frozen.
    return "a program" if isinstance(module, torch.jit.ScriptModule) else name_of(type(module))


def names_of_programs(model: nn.Module) -> set[str]:
    """Names of the tensors in TorchScript; torch's own loader makes plain tensors of its parameters."""
    modules = nn.Module.named_modules(model, remove_duplicate=False)
    programs = [(f"{name}." if name else "", m) for name, m in modules if isinstance(m, torch.jit.ScriptModule)]
    return {prefix + name for prefix, program in programs for name, _ in named(program)}


def structure(model: nn.Module) -> dict[str, Any]:
    """Names, kinds, ties, modes and flags of a module, in the order it has them."""
    modules = list(nn.Module.named_modules(model, remove_duplicate=False))
    # Torch drops the compiler from the wrapper of a compiled module, and makes it again when it is called.
    plain = [m for _, m in modules if not isinstance(m, torch._dynamo.OptimizedModule | torch.jit.ScriptModule)]
    tables = [attributes(module) for module in plain]
    programs = names_of_programs(model)
    return {
        "modules": [(name, kind_of(module), module.training) for name, module in modules],
        "non-persistent buffers": [sorted(table["_non_persistent_buffers_set"]) for table in tables],
        "attributes": [sorted(table) for table in tables],
        "hooks": [
            [(name, len(hooks)) for name, hooks in sorted(table.items()) if name.endswith(HOOKS)] for table in tables
        ],
        "parameters and buffers": [(name, name in programs or type(tensor)) for name, tensor in named(model)],
        "keys of the state": list(model.state_dict()),
        "shared modules": grouped([id(module) for _, module in modules]),
        "tied tensors": grouped([id(tensor) for _, tensor in named(model)]),
        "shared storages": grouped([memory(tensor.untyped_storage()) for _, tensor in in_memory(model)]),
    }


def state_of(model: nn.Module) -> Any:
    """What would tell, in this process, that somebody touched the model."""
    attributes = [
        [(key, _identity(key, value)) for key, value in vars(m).items() if key not in BROUGHT_UP_TO_DATE]
        for m in nn.Module.modules(model)
    ]
    kinds = [type(module) for module in nn.Module.modules(model)]
    tensors = [tensor for _, tensor in filled(model)]
    versions = [tensor._version for tensor in tensors if not tensor.is_inference()]
    places = [tensor.data_ptr() for _, tensor in in_memory(model)]
    return attributes, kinds, [id(tensor) for tensor in tensors], versions, places


def _identity(key: str, value: Any) -> Any:
    if key == "_flat_weights":  # a new list of the same; a parametrized weight is another tensor each time
        return [id(weight) for weight in value if isinstance(weight, nn.Parameter)]
    return value if isinstance(value, str) else id(value)


def differences(model: nn.Module, other: nn.Module) -> list[str]:
    """In what a module is not what another is; empty where they are equal in all that can be seen."""
    for module in (*nn.Module.modules(model), *nn.Module.modules(other)):
        if isinstance(module, nn.RNNBase):
            module._update_flat_weights()  # as torch does whenever one is pickled or called
    expected, found = structure(model), structure(other)
    told = [f"{what}: {expected[what]} became {found[what]}" for what in expected if expected[what] != found[what]]
    programs = names_of_programs(model)
    for (name, tensor), (_, twin) in zip(filled(model), filled(other), strict=False):
        before, after = (facts(each)[name in programs :] for each in (tensor, twin))
        told += [f"{name}: {before} became {after}"] if before != after else []
    return told + differing(*(Facts((each, _not_in(programs, each))).found for each in (model, other)))


def _not_in(programs: set[str], model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in named(model) if name not in programs]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    assert differences(model, other) == []


def seed(number: int) -> None:
    """As `torch.manual_seed`, which each time writes down the stack of its caller for a CUDA that may come."""
    torch.default_generator.manual_seed(number)


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> Facts:
    """What a call returns; random numbers are the same every time."""
    seed(2)
    found = Facts(model(*inputs), whole=False)  # around what a kernel returns its memory may hold anything
    assert found.tensors
    return found


def gradients(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Of each parameter, after a step back from the sum of all floating numbers that a call returned."""
    seed(2)
    model.zero_grad()
    sums = [tensor.sum() for tensor in _tensors_in(model(*inputs)) if tensor.requires_grad]
    if not sums:
        return {}
    torch.stack([total.abs() if total.is_complex() else total for total in sums]).sum().backward()
    found = {name: None if p.grad is None else facts(p.grad) for name, p in nn.Module.named_parameters(model)}
    model.zero_grad()
    return found


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def compared(model: nn.Module, other: nn.Module, inputs: tuple[Any, ...] | None) -> list[str]:
    """In what a copy differs from the model it is of: as it is, in what it computes, and in what that does to it."""
    told = differences(model, other)
    if inputs is None:
        return told
    for how, run in _RUNS.items():
        told += [f"{how}: {what}" for what in differing(run(model, inputs), run(other, inputs))]
    return told + [f"afterwards: {what}" for what in differences(model, other)]


def _without_gradients(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    with torch.no_grad():
        return outputs(model, inputs).found


_RUNS: dict[str, Callable[[nn.Module, tuple[Any, ...]], dict[str, Any]]] = {
    "a call": lambda model, inputs: outputs(model, inputs).found,
    "a call without gradients": _without_gradients,
    "a step back": gradients,
}
