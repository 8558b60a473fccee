"""Hooks of every kind, their order, their settings and their handles."""

from __future__ import annotations

import contextvars
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from zcinfer.parts import join, split
from zoo.compare import buffer_of, outputs, round_trip
from zoo.samples import Models, X, mlp


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[2].register_forward_hook(lambda module, args, kwargs, output: output * 2, with_kwargs=True)
    model.handle = model.register_forward_hook(lambda module, args, output: output - 1)
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(extra=torch.ones(1)))
    return model


class Counter:
    """A hook that is an object, and remembers."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.scale = torch.randn(2)

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        self.seen.append(float(output.detach().sum()))
        return output * self.scale


class OnItself(nn.Module):
    """Its hooks are methods of its own: they belong to the copy afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.captured: list[torch.Tensor] = []
        self.layer.register_forward_hook(self.capture)

    def capture(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.captured.append(output.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y + len(self.captured)


def backward_hooked() -> nn.Module:
    model = mlp()
    scale = torch.tensor(3.0)
    model[0].register_full_backward_hook(lambda module, inputs, outputs: tuple(
        None if gradient is None else gradient * scale for gradient in inputs))  # fmt: skip
    model[2].register_full_backward_pre_hook(lambda module, outputs: tuple(gradient * 2 for gradient in outputs))
    return model


def in_order() -> nn.Module:
    model = mlp()
    model.register_forward_hook(lambda module, args, output: output * 3)
    model.register_forward_hook(lambda module, args, output: output + 1)
    model.register_forward_hook(lambda module, args, output: output * 5, prepend=True)
    removed = model.register_forward_hook(lambda module, args, output: output * 1000)
    removed.remove()
    model.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    model.register_forward_hook(lambda module, args, output: None if output is None else output - 1, always_call=True)
    model.handles = [model[0].register_forward_hook(lambda module, args, output: output + 2) for _ in range(3)]
    return model


def of_states() -> nn.Module:
    model = mlp()
    model.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: state.pop(f"{prefix}extra", None))
    model.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.clear())
    model.register_state_dict_pre_hook(lambda module, prefix, keep: keep and setattr(module, "asked", True))
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(extra=torch.ones(1)))
    return model


def counted() -> nn.Module:
    model = mlp()
    model.counter = Counter()
    model.register_forward_hook(model.counter)
    return model


MODELS: Models = {
    "hooks": (hooked, (X,)),
    "a hook that is an object": (counted, (X,)),
    "hooks that are methods of the model": (OnItself, (X,)),
    "hooks on gradients": (backward_hooked, (X,)),
    "hooks in their order": (in_order, (X,)),
    "hooks on states": (of_states, (X,)),
}


def test_hooks_of_the_copy_can_be_removed() -> None:
    model = mlp()
    model.handle = model.register_forward_hook(lambda module, args, output: output * 2)
    other = round_trip(model)
    doubled = other(X)
    other.handle.remove()
    assert torch.equal(other(X) * 2, doubled)
    assert torch.equal(model(X), doubled)


def test_a_new_hook_of_the_copy_replaces_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    model.register_forward_hook(lambda module, args, output: output * 2)
    parts = split(model)
    # As in a process that has made no hooks yet.
    monkeypatch.setattr(RemovableHandle, "next_id", next(iter(model._forward_hooks)))
    other = join(parts.skeleton, parts.description, buffer_of(parts))
    other.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(other(X), model(X) + 1)


def test_modules_and_hook_tables_are_each_their_own() -> None:
    model = round_trip(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("first"))
    model[1].register_forward_pre_hook(lambda *_: calls.append("second"), prepend=True)
    model(torch.ones(1, 2))
    assert calls == ["first", "second"]
    tables = [id(value) for module in model.modules() for value in vars(module).values() if isinstance(value, dict)]
    assert len(tables) == len(set(tables))


def test_hooks_of_the_copy_write_to_the_copy() -> None:
    model = OnItself()
    copy = round_trip(model)
    copy(X)
    assert (len(model.captured), len(copy.captured)) == (0, 1)
    (hook,) = copy.layer._forward_hooks.values()
    assert hook.__self__ is copy


def test_hooks_on_states_work_in_the_copy() -> None:
    copy = round_trip(of_states())
    state = copy.state_dict(keep_vars=True)
    assert (copy.asked, "extra" in state) == (True, True)
    del state["0.bias"]
    copy.load_state_dict(state)


def test_a_hook_that_is_called_whatever_happens_is_called_in_the_copy() -> None:
    copy = round_trip(in_order())
    seen = []
    copy.register_forward_hook(lambda *_: seen.append(True), always_call=True)
    with pytest.raises(RuntimeError):
        copy(torch.ones(2, 7))
    assert seen == [True]
    assert outputs(copy, (X,)).found == outputs(round_trip(copy), (X,)).found


STATE = {"calls": 0}
CONTEXT = contextvars.ContextVar("context", default=0)  # which no pickle carries


def test_a_local_function_keeps_the_globals_of_its_module() -> None:
    model = nn.Linear(2, 2)

    def hook(*_: Any) -> None:
        STATE["calls"] += 1 + CONTEXT.get()

    model.register_forward_hook(hook)
    before = STATE["calls"]
    round_trip(model)(torch.ones(1, 2))
    assert STATE["calls"] == before + 1
