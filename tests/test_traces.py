"""Calls of modules bear their names in a trace, and are what they were in all else."""

from __future__ import annotations

import copy
import gc
import pickle
import traceback
import warnings
from typing import Any

import pytest
import torch
from torch import fx, nn

from zcinfer import traces


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("as was to be")


@pytest.fixture(autouse=True)
def _torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "__call__", nn.Module.__call__)
    monkeypatch.setattr(traces, "_torchs_call", None)


def names_in_trace(model: nn.Module) -> list[str]:
    with pytest.raises(RuntimeError, match="as was to be") as failed:
        model(torch.zeros(2, 4))
    return [frame.name for frame in traceback.extract_tb(failed.tb) if frame.name.endswith(")")]


def deep(last: nn.Module) -> Any:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), last)).eval()


def test_a_trace_names_each_module_on_the_way() -> None:
    model = deep(Fails())
    assert names_in_trace(model) == []
    traces.name_frames(model, "topics@3")
    assert names_in_trace(model) == ["topics@3 (Sequential)", "1 of topics@3 (Sequential)", "1.1 of topics@3 (Fails)"]
    assert names_in_trace(copy.deepcopy(model)) == []
    assert names_in_trace(deep(Fails())) == []


def test_modules_compute_and_travel_as_before() -> None:
    model, x = deep(nn.Linear(4, 3)), torch.randn(2, 4)
    wanted, content = model(x), pickle.dumps(model)
    traces.name_frames(model, "topics@3")
    assert torch.equal(model(x), wanted)
    assert torch.equal(model(input=x), wanted)
    assert pickle.dumps(model) == content
    assert torch.equal(fx.symbolic_trace(model)(x), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert torch.equal(torch.jit.trace(model, x)(x), wanted)


@pytest.mark.parametrize("is_compiled_first", [True, False])
def test_what_is_compiled_is_whole(is_compiled_first: bool) -> None:
    model, x = deep(nn.Linear(4, 3)), torch.randn(2, 4)
    wanted = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    if is_compiled_first:
        compiled(x)
    traces.name_frames(model, "topics@3")
    assert torch.equal(compiled(x), wanted)
    assert torch.equal(model(x), wanted)


def test_a_dropped_model_leaves_nothing() -> None:
    gc.collect()  # what other tests have left
    before = len(traces._named)
    model = deep(Fails())
    traces.name_frames(model, "topics@3")
    assert len(traces._named) == before + 5
    del model
    gc.collect()
    assert len(traces._named) == before
