"""Splitting and joining: the copy is the model bit for bit, lies in the buffer, and the model is untouched."""

from __future__ import annotations

import collections
import contextvars
import ctypes
import dataclasses
import functools
import gc
import importlib
import io
import re
import socket
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.hooks import RemovableHandle

from zcinfer import skeleton
from zcinfer.errors import ModelCodeMissing, ModelError, SplitError
from zcinfer.parts import Parts, join, join_fake, split

pytestmark = [
    # Torch's own, about layouts and norms that it means to change
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # torch's own use of it
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
]


def buffer_of(parts: Parts) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytearray(b"".join(parts.pieces())), np.uint8)


def round_trip(model: nn.Module) -> Any:
    parts = split(model)
    return join(parts.skeleton, parts.description, buffer_of(parts))


def content(storage: torch.UntypedStorage) -> bytes:
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""


def facts(tensor: torch.Tensor) -> Any:
    """All there is to know of a tensor but which one it is."""
    known = [type(tensor), tensor.dtype, tensor.layout, tensor.requires_grad, tensor.device, tensor.is_leaf]
    # Torch's compiler leaves a mark on each.
    known += [[name for name in tensor.__dict__ if not name.startswith("_dynamo")]]
    known += [tensor.is_quantized, tensor.is_nested, tensor.is_conj(), tensor.is_neg()]
    if tensor.is_nested:
        return [*known, [facts(part) for part in tensor.unbind()]]
    known.append(tensor.shape)
    if tensor.is_quantized:
        return [*known, str(tensor.qscheme()), tensor.q_scale(), tensor.q_zero_point(), tensor.int_repr().tolist()]
    if tensor.layout is torch.sparse_coo:
        return [*known, tensor.is_coalesced(), facts(tensor._indices()), facts(tensor._values())]
    if tensor.layout is torch.sparse_csr:
        return [*known, facts(tensor.crow_indices()), facts(tensor.col_indices()), facts(tensor.values())]
    known += [tensor.stride(), tensor.storage_offset()]
    return [*known, content(tensor.untyped_storage())] if tensor.device.type == "cpu" else known


def named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters and buffers with their names; tied ones once for each."""
    # Torch's own methods: a model of the zoo overrides them.
    parameters = nn.Module.named_parameters(model, remove_duplicate=False)
    return [*parameters, *nn.Module.named_buffers(model, remove_duplicate=False)]


def filled(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Those of `named` that have a shape."""
    return [(name, tensor) for name, tensor in named(model) if not nn.parameter.is_lazy(tensor)]


def in_memory(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Those of `named` that lie in one storage of this machine."""
    tensors = [(name, t) for name, t in filled(model) if t.layout is torch.strided and not t.is_nested]
    return [(name, tensor) for name, tensor in tensors if tensor.device.type == "cpu"]


def grouped(keys: list[Any]) -> list[int]:
    """For each key the position of the first that is equal: which of them are one."""
    return [keys.index(key) for key in keys]


def structure(model: nn.Module) -> Any:
    """Names, kinds, ties, modes and flags of a module, in the order it has them."""
    modules = list(model.named_modules(remove_duplicate=False))
    # Torch drops the compiler from the wrapper of a compiled module, and makes it again when it is called.
    plain = [module for _, module in modules if not isinstance(module, torch._dynamo.OptimizedModule)]
    return [
        [(name, type(module).__qualname__, module.training) for name, module in modules],
        [sorted(module._non_persistent_buffers_set) for _, module in modules],
        [sorted(vars(module)) for module in plain],
        [[len(getattr(module, f"_forward{kind}")) for kind in ("_hooks", "_pre_hooks")] for _, module in modules],
        [(name, type(tensor)) for name, tensor in named(model)],
        list(model.state_dict()),
        grouped([id(module) for _, module in modules]),
        grouped([id(tensor) for _, tensor in named(model)]),
        grouped([tensor.untyped_storage()._cdata for _, tensor in in_memory(model)]),
    ]


def state_of(model: nn.Module) -> Any:
    """What would tell that somebody touched the model."""
    attributes = [
        # A graph writes its own code again, to the letter, whenever it is pickled.
        [
            (key, value if isinstance(value, str) else id(value))
            for key, value in vars(m).items()
            if key != "_lineno_map"
        ]
        for m in model.modules()
    ]
    versions = [tensor._version for _, tensor in filled(model) if not tensor.is_inference()]
    return attributes, [type(module) for module in model.modules()], versions


def assert_same(model: nn.Module, other: nn.Module) -> None:
    assert structure(other) == structure(model)
    for (name, tensor), (_, twin) in zip(filled(model), filled(other), strict=True):
        assert facts(twin) == facts(tensor), name


# --- the zoo: how to build each model, and what to call it with ------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x))


class Views(nn.Module):
    """Tensors that lie in one storage, and in other orders than the usual one."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(6, 8)
        self.first, self.second = nn.Parameter(base[:3]), nn.Parameter(base[2:])
        self.transposed = nn.Parameter(torch.randn(4, 3).t())
        self.strided = nn.Parameter(torch.randn(8, 8)[::2, 1::3])
        self.register_buffer("expanded", torch.randn(1, 8).expand(3, 8))
        self.register_buffer("same", base)
        self.register_buffer("channels_last", torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last))
        self.register_buffer("scalar", base[0, 0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.first.t() @ self.transposed @ self.strided[:, :1] + self.expanded.sum() + self.scalar


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass
class Box:
    tensor: torch.Tensor


class Outside(nn.Module):
    """Tensors where no registry of torch knows of them."""

    def __init__(self) -> None:
        super().__init__()
        captured, in_partial = torch.randn(3), torch.randn(3)
        self.layer = nn.Linear(3, 3)
        self.plain = torch.randn(3)
        self.listed = [torch.randn(3), (torch.randn(3), {"deep": torch.randn(3)})]
        self.table = {"a": torch.randn(3), self: 1}
        self.pair = Pair(self.plain, torch.randn(3))
        self.box = Box(self.layer.weight)
        self.storage = torch.randn(3).untyped_storage()
        self.array = np.arange(3.0)
        self.function = lambda x: x + captured
        self.partial = functools.partial(torch.add, in_partial)
        self.bound = self.plain.add
        self.layer.register_forward_hook(lambda module, args, output: output * captured)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bound(self.partial(self.function(self.layer(x))))
        for tensor in (self.plain, self.listed[0], self.listed[1][0], self.listed[1][1]["deep"], self.table["a"]):
            x = x + tensor
        return x + self.pair.left + self.pair.right + self.box.tensor.sum() + float(self.array.sum())


def hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[2].register_forward_hook(lambda module, args, kwargs, output: output * 2, with_kwargs=True)
    model.handle = model.register_forward_hook(lambda module, args, output: output - 1)
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(extra=torch.ones(1)))
    return model


def of_a_local_class() -> nn.Module:
    factor = torch.randn(2)

    class Local(nn.Linear):
        offset = torch.randn(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * factor + self.offset

    return Local(4, 2)


def flagged() -> nn.Module:
    model = convolution()
    model[0].weight.requires_grad = False
    model[1].eval()
    model.register_buffer("kept", torch.ones(2))
    model.register_buffer("lost", torch.ones(2), persistent=False)
    model.register_buffer("none", None)
    model.register_parameter("nothing", None)
    return model


def empties() -> nn.Module:
    model = nn.Linear(0, 3)
    model.register_buffer("empty", torch.empty(2, 0, 3))
    model.register_buffer("end", torch.arange(4)[4:])
    model.register_parameter("shared", nn.Parameter(torch.empty(0)))
    model.tied = model.shared
    return model


def attributed() -> nn.Module:
    model = mlp()
    model[0].weight.unit = "m"
    model[0].weight.others = [model[0].weight, model[2].bias]
    model.buffer = nn.Buffer(torch.ones(3))
    model.lost = nn.Buffer(torch.ones(3), persistent=False)
    return model


def unusual() -> nn.Module:
    model = nn.Module()
    model.sparse = torch.eye(3).to_sparse()
    model.register_buffer("coo", torch.eye(3).to_sparse())
    model.register_buffer("csr", torch.eye(3).to_sparse_csr())
    model.register_buffer("quantised", torch.quantize_per_tensor(torch.randn(5), 0.1, 3, torch.qint8))
    model.register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    model.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
    model.register_buffer("negative", torch.randn(3, dtype=torch.complex64).conj().imag)
    model.register_buffer("meta", torch.empty(3, device="meta"))
    return model


class Protocols(nn.Module):
    """A module with a say in its own pickling; its copies by `copy` would be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.lock = threading.Lock()
        self.history = ["made"]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a model is never copied")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def get_extra_state(self) -> Any:
        return {"extra": 1}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("no state is ever loaded")

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
        return super().named_parameters(prefix, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return self.layer(x)


def cyclic() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].neighbours = [model, model[1]]
    model[1].others = {model, model[0]}
    model.append(model[0])
    return model


def ran(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    model(*inputs)
    return model


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[1, 2, 3]])

ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...] | None]] = {
    "mlp": (mlp, (X,)),
    "no tensors": (nn.ReLU, (X,)),
    "convolution and norm in train mode": (convolution, (IMAGE,)),
    "convolution and norm in eval mode": (lambda: ran(convolution(), IMAGE).eval(), (IMAGE,)),
    "channels last": (lambda: convolution().to(memory_format=torch.channels_last).eval(), (IMAGE,)),
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True), (X,)),
    "lstm with a projection": (lambda: nn.LSTM(4, 3, proj_size=2), (X,)),
    "gru": (lambda: nn.GRU(4, 3), (X,)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), (X[None],)),
    "tied weights": (Tied, (TOKENS,)),
    "views": (Views, (torch.ones(2, 8),)),
    "tensors outside the registries": (Outside, (X[:, :3],)),
    "flags": (flagged, (IMAGE,)),
    "empty tensors": (empties, (torch.ones(2, 0),)),
    "hooks": (hooked, (X,)),
    "a local class": (of_a_local_class, (X,)),
    "tensors with attributes": (attributed, (X,)),
    "unusual tensors": (unusual, None),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()), None),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), None),
    "parametrized by weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), (X,)),
    "parametrized by spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), (X,)),
    "parametrized by orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), (X,)),
    "parametrized within": (lambda: nn.Sequential(mlp(), parametrizations.weight_norm(nn.Linear(2, 2))), (X,)),
    "parametrized twice": (
        lambda: parametrizations.weight_norm(parametrizations.spectral_norm(nn.Linear(4, 3)), "bias", dim=None),
        (X,),
    ),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), (X,)),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), (X,)),
    "its own protocols": (Protocols, (X[:, :3],)),
    "cycles": (cyclic, (X[:, :3],)),
    "lists and dicts of parameters": (
        lambda: nn.ModuleList([nn.ParameterList([torch.ones(2)]), nn.ParameterDict({"a": torch.ones(3)})]),
        None,
    ),
    "a graph": (lambda: torch.fx.symbolic_trace(mlp()), (X,)),
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), (X,)),
    "a norm of embeddings": (lambda: nn.Embedding(10, 4, max_norm=0.1), (TOKENS,)),
    "trained": (lambda: trained(), (X,)),
}


def trained() -> nn.Module:
    model = mlp()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimiser.step()
    return model


def build(case: str) -> tuple[nn.Module, tuple[torch.Tensor, ...] | None]:
    torch.manual_seed(0)
    make, inputs = ZOO[case]
    return make(), inputs


def outputs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    torch.manual_seed(2)
    found = model(*inputs)
    flat: list[torch.Tensor] = []

    def gather(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            flat.append(value)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
            gather(part)

    gather(found)
    assert flat
    return flat


@pytest.mark.parametrize("case", ZOO)
class TestZoo:
    def test_the_copy_has_the_same_structure_and_tensors(self, case: str) -> None:
        model, _ = build(case)
        assert_same(model, round_trip(model))

    def test_the_model_is_untouched(self, case: str) -> None:
        model, _ = build(case)
        twin, _ = build(case)
        before = state_of(model)
        round_trip(model)
        assert state_of(model) == before
        assert_same(twin, model)

    def test_the_copy_has_the_same_description(self, case: str) -> None:
        model, _ = build(case)
        parts = split(model)
        again = split(join(parts.skeleton, parts.description, buffer_of(parts))).description
        assert again.digest == parts.description.digest
        assert (again.tensors, again.storages) == (parts.description.tensors, parts.description.storages)

    def test_no_storage_is_copied(self, case: str) -> None:
        model, _ = build(case)
        parts = split(model)
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for _, t in in_memory(model))}
        assert sum(spec.nbytes for spec in parts.description.storages) >= sum(storages.values())
        buffer = buffer_of(parts)
        other = join(parts.skeleton, parts.description, buffer)
        for name, tensor in in_memory(other):
            assert tensor.numel() == 0 or lies_in(buffer, tensor), name


@pytest.mark.parametrize("case", [case for case in ZOO if ZOO[case][1] is not None])
def test_the_copy_computes_the_same_bits(case: str) -> None:
    model, inputs = build(case)
    assert inputs is not None
    other = round_trip(model)
    for expected, found in zip(outputs(model, inputs), outputs(other, inputs), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    # And has changed itself as the model has.
    assert_same(model, other)


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_transformers_model_comes_back() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ).eval()
    before = state_of(model)
    parts = split(model)
    other = join(parts.skeleton, parts.description, buffer_of(parts))
    assert_same(model, other)
    assert state_of(model) == before
    assert all(map(torch.equal, outputs(model, (TOKENS,)), outputs(other, (TOKENS,))))
    assert split(other).description.digest == parts.description.digest


def lies_in(buffer: np.ndarray[Any, Any], tensor: torch.Tensor) -> bool:
    return buffer.ctypes.data <= tensor.data_ptr() < buffer.ctypes.data + buffer.nbytes


def test_the_zoo_has_models_with_every_kind_of_tensor() -> None:
    """So that the tests above cannot pass by comparing nothing."""
    tensors = [tensor for case in ZOO for _, tensor in filled(build(case)[0])]
    assert {t.layout for t in tensors} == {torch.strided, torch.sparse_coo, torch.sparse_csr}
    assert {t.requires_grad for t in tensors} == {True, False}
    assert any(t.is_quantized for t in tensors)
    assert any(not t.is_contiguous() for t in tensors if t.layout is torch.strided and not t.is_nested)
    assert any(t.__dict__ for t in tensors)


# --- every dtype -----------------------------------------------------------------------------------------------------


def bits_as(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(64, dtype=torch.uint8).view(dtype)


def viewable(dtype: torch.dtype) -> bool:
    if str(dtype).startswith(("torch.qint", "torch.quint")):
        return False  # those need a scale as well: see `unusual`
    try:
        bits_as(dtype)
    except (RuntimeError, NotImplementedError):
        return False
    return True


DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype) and viewable(d)}, key=str)


def test_torch_has_at_least_these_dtypes() -> None:
    expected = {torch.bfloat16, torch.float8_e5m2, torch.complex32, torch.bool, torch.uint64, torch.float4_e2m1fn_x2}
    assert set(DTYPES) >= expected
    assert len(DTYPES) >= 25


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(dtype: torch.dtype) -> None:
    tensor = bits_as(dtype)
    model = nn.Module()
    model.register_buffer("buffer", tensor)
    model.register_buffer("view", tensor[3:7])
    model.register_parameter("parameter", nn.Parameter(bits_as(dtype), requires_grad=False))
    model.plain = {"tensor": bits_as(dtype)}
    other = round_trip(model)
    assert_same(model, other)
    assert facts(other.plain["tensor"]) == facts(model.plain["tensor"])


def test_attributes_of_tensors_keep_their_ties() -> None:
    model = attributed()
    other = round_trip(model)
    assert other[0].weight.unit == "m"
    assert other[0].weight.others[0] is other[0].weight
    assert other[0].weight.others[1] is other[2].bias
    assert isinstance(other.buffer, nn.Buffer)


def test_tensors_outside_the_registries_keep_their_ties() -> None:
    other = round_trip(Outside())
    assert other.pair.left is other.plain
    assert other.bound.__self__ is other.plain
    assert other.box.tensor is other.layer.weight
    assert list(other.table) == ["a", other]
    (captured,) = (cell.cell_contents for cell in other.function.__closure__)
    (hook,) = other.layer._forward_hooks.values()
    assert hook.__closure__[0].cell_contents is captured


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_a_trainable_parameter_of_any_dtype_stays_so(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2).to(dtype)
    assert round_trip(model).weight.requires_grad
    assert_same(model, round_trip(model))


# --- random trees ----------------------------------------------------------------------------------------------------

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


# --- the copy and its buffer -----------------------------------------------------------------------------------------


def test_writes_to_the_copy_never_reach_the_model() -> None:
    model = nn.Sequential(Views(), convolution())
    before = [facts(tensor) for _, tensor in named(model)]
    other = round_trip(model)
    with torch.no_grad():
        for _, tensor in named(other):
            if tensor.is_contiguous():
                tensor.fill_(7)
    assert [facts(tensor) for _, tensor in named(model)] == before


def test_the_buffer_lives_as_long_as_any_tensor_of_the_copy() -> None:
    parts = split(mlp())
    buffer = buffer_of(parts)
    gone = weakref.ref(buffer)
    other = join(parts.skeleton, parts.description, buffer)
    view = other[0].weight[0]
    del buffer, other
    gc.collect()
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None


def test_small_tensors_and_buffers_can_be_had_as_copies() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(4000, affine=False), Views())
    parts = split(model)
    buffer = buffer_of(parts)
    other = join(parts.skeleton, parts.description, buffer, copy_small=True)
    assert_same(model, other)
    assert [name for name, tensor in named(other) if lies_in(buffer, tensor)] == ["0.weight"]


def test_a_copy_made_under_inference_mode_can_be_trained_and_cast() -> None:
    with torch.inference_mode():
        other = round_trip(mlp())
    other(X).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert other.half()[0].weight.dtype == torch.float16


def test_a_model_made_under_inference_mode_can_be_split() -> None:
    with torch.inference_mode():
        model = mlp()
    other = round_trip(model)
    assert torch.equal(other[0].weight, model[0].weight)
    assert not other[0].weight.is_inference()


def test_gradients_stay_behind() -> None:
    model = mlp()
    model(X).sum().backward()
    assert round_trip(model)[0].weight.grad is None
    assert model[0].weight.grad is not None


def test_parametrizations_can_be_removed_from_the_copy() -> None:
    model = parametrizations.weight_norm(nn.Linear(4, 3))
    other = round_trip(model)
    expected = model(X)
    assert type(other).__bases__ == (nn.Linear,)
    parametrize.remove_parametrizations(other, "weight")
    assert type(other) is nn.Linear
    assert torch.equal(other(X), expected)


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


def test_a_copy_without_weights_has_the_same_structure() -> None:
    model = nn.Sequential(Views(), convolution(), Tied())
    model.handle = model.register_forward_hook(lambda module, args, output: output)
    parts = split(model)
    with torch._subclasses.FakeTensorMode():
        fake = join_fake(parts.skeleton, parts.description)
    for (name, tensor), (twin_name, twin) in zip(named(model), named(fake), strict=True):
        assert name == twin_name
        assert (twin.shape, twin.dtype, twin.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        assert isinstance(twin, nn.Parameter) == isinstance(tensor, nn.Parameter)


# --- the description -------------------------------------------------------------------------------------------------


def test_submodules_in_train_mode_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    model[1].train()
    assert split(model).description.training == ("1",)
    assert split(model.train()).description.training == ("", "0", "1")


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (nn.Linear(2, 2), "float32"),
        (nn.Linear(2, 2).bfloat16(), "bfloat16"),
        (nn.ReLU(), ""),
        (nn.BatchNorm1d(2, False), "float32"),
    ],
)
def test_the_floating_dtype_is_told(model: nn.Module, dtype: str) -> None:
    assert split(model).description.dtype == dtype


def test_the_class_is_named_in_full() -> None:
    assert split(nn.Linear(2, 2)).description.class_name == "torch.nn.modules.linear.Linear"


def test_storages_go_by_the_names_of_their_tensors() -> None:
    names = [storage.name for storage in split(nn.Sequential(Tied(), convolution())).description.storages]
    assert "0.embedding.weight" in names
    assert "1.1.running_mean" in names
    assert len(set(names)) == len(names)


LARGE = torch.zeros(200, 200)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: LARGE, id="attribute"),
        pytest.param(lambda: [(LARGE,)], id="list"),
        pytest.param(lambda: eval("lambda x: x + LARGE", {"LARGE": LARGE}), id="global of a lambda"),
        pytest.param(lambda: (lambda large: lambda x: x + large)(LARGE), id="closure"),
        pytest.param(lambda: functools.partial(torch.add, LARGE), id="partial"),
        pytest.param(lambda: LARGE.add, id="method"),
        pytest.param(lambda: LARGE.untyped_storage(), id="storage"),
        pytest.param(lambda: torch.ones(200, 200).to_sparse(), id="sparse"),
        pytest.param(lambda: torch.quantize_per_tensor(LARGE, 1.0, 0, torch.qint8), id="quantised"),
        pytest.param(lambda: LARGE.to(torch.complex64).conj(), id="conjugate"),
        pytest.param(lambda: LARGE[::2, ::2], id="strided"),
        pytest.param(lambda: nn.Buffer(LARGE), id="buffer with attributes"),
    ],
)
def test_no_tensor_stays_in_the_skeleton(make: Callable[[], Any]) -> None:
    model = nn.Module()
    model.value = make()
    parts = split(model)
    assert len(parts.skeleton) < 4096
    assert parts.description.nbytes >= 40_000


def test_tied_weights_are_stored_once() -> None:
    assert len(split(Tied()).description.storages) == 1


# --- what is refused -------------------------------------------------------------------------------------------------


class Holder:
    def __init__(self, inner: Any):
        self.inner = inner


@pytest.fixture
def closing() -> Iterator[list[Any]]:
    """Things to close after the test."""
    opened: list[Any] = []
    yield opened
    for thing in opened:
        thing.close()


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "lock": (threading.Lock, "lock"),
    "generator": (lambda: (i for i in range(3)), "generator"),
    "text file, read": (lambda: open(__file__), "TextIOWrapper"),  # noqa: SIM115
    "text file, written": (lambda: tempfile.TemporaryFile("w"), "not opened for reading"),  # noqa: SIM115
    "binary file": (lambda: open(__file__, "rb"), "BufferedReader"),  # noqa: SIM115
    "socket": (socket.socket, "socket"),
    "weak reference": (lambda: weakref.ref(Holder), "weakref"),
    "frame": (sys._getframe, "frame"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_pickled_is_named_with_its_reason(case: str, closing: list[Any]) -> None:
    make, reason = BAD[case]
    model = mlp()
    model[2].bad = make()
    if hasattr(model[2].bad, "fileno"):
        closing.append(model[2].bad)
    before = state_of(model)
    with pytest.raises(SplitError, match=rf"Sequential\.2\.bad .*{reason}"):
        split(model)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda bad: {"key": [1, bad]}, "bad['key'][1]"),
        (lambda bad: (bad,), "bad[0]"),
        (lambda bad: Holder({"a": Holder(bad)}), "bad.inner['a'].inner"),
        (lambda bad: collections.OrderedDict(x=bad), "bad['x']"),
    ],
    ids=["lists in dicts", "tuple", "objects", "ordered dict"],
)
@pytest.mark.parametrize("make", [threading.Lock, lambda: open(__file__)], ids=["by pickle", "by us"])  # noqa: SIM115
def test_the_path_goes_down_to_the_culprit(
    make: Callable[[], Any], wrap: Callable[[Any], Any], path: str, closing: list[Any]
) -> None:
    bad = make()
    if isinstance(bad, io.IOBase):
        closing.append(bad)
    model = mlp()
    model[2].bad = wrap(bad)
    with pytest.raises(SplitError, match=re.escape(f"Sequential.2.{path} (a {type(bad).__name__})")):
        split(model)


@pytest.mark.parametrize("thing", [3, None, nn.Linear, {"weight": torch.ones(2)}, "bert"])
def test_only_modules_are_taken(thing: Any) -> None:
    with pytest.raises(SplitError, match=r"must be a torch\.nn\.Module"):
        split(thing)


def test_too_deep_a_model_is_refused_with_the_way_out() -> None:
    model: nn.Module = nn.ReLU()
    for _ in range(500):
        model = nn.Sequential(model)
    with pytest.raises(SplitError, match=r"too deeply.*setrecursionlimit"):
        split(model)


@pytest.mark.parametrize("fits", ["lambda", "views of dicts", "cached"])
def test_some_things_that_plain_pickle_refuses_are_taken(fits: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model.thing = {
        "lambda": lambda: 3,
        "views of dicts": model.keys(),
        "cached": functools.lru_cache(lambda: 3),
    }[fits]
    other = round_trip(model)
    assert other.thing() == 3 if callable(model.thing) else list(other.thing) == ["a"]


# --- code that is not there, or fails --------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module that other processes may not have; it is forgotten when the test asks for it."""
    (tmp_path / "zc_foreign.py").write_text(
        """
import torch
class Net(torch.nn.Linear):
    pass
class Fails(torch.nn.Linear):
    def __setstate__(self, state):
        raise KeyError("gone")
class Imports(torch.nn.Linear):
    def __setstate__(self, state):
        from json import no_such_name
class NoModule(torch.nn.Linear):
    def __reduce__(self):
        return dict, ()
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("zc_foreign")
    sys.modules.pop("zc_foreign", None)


def test_a_missing_package_is_named(foreign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = split(foreign.Net(2, 2))
    monkeypatch.delitem(sys.modules, "zc_foreign")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "zc_foreign.py").exists()])
    importlib.invalidate_caches()
    with pytest.raises(ModelCodeMissing, match=r"zc_foreign\.Net.*'zc_foreign' importable"):
        join(parts.skeleton, parts.description, buffer_of(parts))


def test_the_version_of_a_missing_class_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = split(nn.Linear(2, 2))
    monkeypatch.delattr("torch.nn.modules.linear.Linear")
    with pytest.raises(ModelCodeMissing, match=rf"install torch=={torch.__version__}".replace("+", r"\+")):
        join(parts.skeleton, parts.description, buffer_of(parts))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("Fails", ModelError, r"zc_foreign\.Fails.*KeyError: 'gone'"),
        ("Imports", ModelCodeMissing, "no_such_name"),
        ("NoModule", ModelError, "comes back as a dict"),
    ],
)
def test_a_model_whose_code_fails_is_named(foreign: Any, name: str, error: type[Exception], message: str) -> None:
    parts = split(getattr(foreign, name)(2, 2))
    with pytest.raises(error, match=message):
        join(parts.skeleton, parts.description, buffer_of(parts))


def test_a_module_of_another_torch_gets_the_attributes_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton, "_EXPECTED", frozenset())
    model = nn.Linear(2, 3)
    expected = set(vars(model))
    del vars(model)["_forward_hooks_with_kwargs"]
    parts = split(model)
    buffer = bytearray(b"".join(bytes(piece) for piece in parts.pieces()))
    assert vars(join(parts.skeleton, parts.description, buffer)).keys() < expected
    older = dataclasses.replace(parts.description, requires={"torch": "2.0.0"})
    assert vars(join(parts.skeleton, older, buffer)).keys() == expected


def test_modules_and_hook_tables_are_each_their_own() -> None:
    model = round_trip(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("first"))
    model[1].register_forward_pre_hook(lambda *_: calls.append("second"), prepend=True)
    model(torch.ones(1, 2))
    assert calls == ["first", "second"]
    tables = [id(value) for module in model.modules() for value in vars(module).values() if isinstance(value, dict)]
    assert len(tables) == len(set(tables))


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


def test_a_transformers_model_that_was_called_comes_back() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ).eval()
    tokens = torch.tensor([[1, 2, 3]])
    expected = model(tokens, output_hidden_states=True).hidden_states  # leaves hooks behind
    found = round_trip(model)(tokens, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    assert all(map(torch.equal, found, expected))
