"""Random trees of layers whose parameters are tied, cut, cast and frozen at random."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from zcinfer.parts import join, split
from zoo.compare import assert_same, buffer_of, state_of

# Drawing takes long where other processes take the time.
SLOW = [HealthCheck.too_slow]

SIZES = st.integers(1, 4)
FLOATS = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
LEAVES = st.one_of(
    st.builds(nn.Linear, SIZES, SIZES, bias=st.booleans(), dtype=FLOATS),
    st.builds(nn.Conv1d, SIZES, SIZES, SIZES, dtype=FLOATS),
    st.builds(nn.Embedding, SIZES, SIZES, dtype=FLOATS),
    st.builds(nn.LayerNorm, SIZES, dtype=FLOATS),
    st.builds(nn.BatchNorm1d, SIZES, dtype=FLOATS),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda modules: nn.Sequential(*modules)),
        st.dictionaries(st.sampled_from(["a", "b", "c d"]), inner, max_size=3).map(nn.ModuleDict),
    ),
    max_leaves=6,
)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """A tree of layers whose parameters are then tied, made views of one another, strided, expanded, cast or frozen."""
    model = nn.Sequential(draw(TREES))
    places = [(m, name) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    for _ in range(draw(st.integers(0, 6)) if places else 0):
        (module, name), (other, other_name) = (draw(st.sampled_from(places)) for _ in range(2))
        mine, theirs = module._parameters[name], other._parameters[other_name]
        assert mine is not None
        assert theirs is not None
        what = draw(st.sampled_from(["tie", "view", "stride", "expand", "freeze", "cast", "buffer", "mode", "share"]))
        grad = theirs.requires_grad
        if what == "tie":
            module._parameters[name] = theirs
        elif what == "view":
            module._parameters[name] = nn.Parameter(theirs.detach().flatten()[draw(st.integers(0, 2)) :], grad)
        elif what == "stride":
            module._parameters[name] = nn.Parameter(
                theirs.detach().t() if theirs.ndim == 2 else theirs.detach()[::2], grad
            )
        elif what == "expand" and theirs.numel():
            module._parameters[name] = nn.Parameter(theirs.detach()[:1].expand(3, *theirs.shape[1:]), grad)
        elif what == "freeze":
            mine.requires_grad_(False)
        elif what == "cast":
            module._parameters[name] = nn.Parameter(mine.detach().to(torch.int8), requires_grad=False)
        elif what == "buffer":
            module.register_buffer(f"buffer{len(module._buffers)}", theirs.detach(), persistent=draw(st.booleans()))
        elif what == "mode":
            module.train(draw(st.booleans()))
        else:
            model.append(module)
    return model


@settings(max_examples=80, deadline=None, suppress_health_check=SLOW)
@given(models())
def test_any_tree_of_layers_comes_back(model: nn.Module) -> None:
    before = state_of(model)
    parts = split(model)
    other = join(parts.skeleton, parts.description, buffer_of(parts))
    assert_same(model, other)
    assert state_of(model) == before
    assert split(other).description.digest == parts.description.digest
