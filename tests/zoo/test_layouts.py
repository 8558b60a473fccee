"""Tensors that are not one contiguous piece: strided, expanded, sparse, nested, conjugate, empty, without memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from zcinfer.errors import SplitError
from zcinfer.parts import split
from zoo.compare import assert_same, round_trip
from zoo.facts import facts
from zoo.samples import IMAGE, Models, Views, X, convolution


def buffers(**tensors: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    return model


def empties() -> nn.Module:
    model = nn.Linear(0, 3)
    model.register_buffer("empty", torch.empty(2, 0, 3))
    model.register_buffer("end", torch.arange(4)[4:])
    model.register_parameter("shared", nn.Parameter(torch.empty(0)))
    model.tied = model.shared
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


def strided() -> nn.Module:
    base = torch.randn(4, 6, 8)
    return buffers(
        base=base,
        reordered=base.permute(2, 0, 1),
        every_other=base[::2, 1::2, ::3],
        last=base[-1, -1, -1],
        within=base[1:3, 2:4, 3:5],
        overlapping=torch.arange(10.0).as_strided((4, 3), (1, 2)),
        windows=torch.arange(10.0).unfold(0, 4, 2),
        expanded=torch.randn(1, 3, 1).expand(5, 3, 2),
        ones=torch.randn(3).as_strided((3, 1, 1), (1, 7, 9)),  # of an axis of length 1 any stride will do
        zero_dimensional=torch.tensor(3.0),
        of_a_longer_storage=torch.randn(1000)[500:510],
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        channels_last_3d=torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    )


def odd_addresses() -> nn.Module:
    """Storages whose lengths are no multiple of anything, and tensors at odd places in one."""
    packed = torch.arange(255, dtype=torch.uint8)
    sizes = [torch.arange(size, dtype=torch.uint8) for size in (1, 3, 63, 65, 4095, 4097)]
    return buffers(
        packed=packed,
        at_three=packed[3:7],
        doubles_at_eight=packed[8:72].view(torch.float64),
        **{f"of_{size.numel()}": size for size in sizes},
    )


class SparseLayer(nn.Module):
    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        dense = torch.randn(4, 4) * (torch.rand(4, 4) > 0.5)
        blocks = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
        self.weight = nn.Parameter(dense.to_sparse(layout=layout, blocksize=blocks), requires_grad=False)
        self.register_buffer("lost", self.weight.detach().clone(), persistent=False)
        self.plain = self.weight.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.to_dense()


def sparse_of_other_kinds() -> nn.Module:
    indices = torch.tensor([[0, 0, 1], [2, 2, 0]])
    return buffers(
        uncoalesced=torch.sparse_coo_tensor(indices, torch.arange(3.0), (2, 3)),
        coalesced=torch.sparse_coo_tensor(indices[:, 1:], torch.arange(2.0), (2, 3)).coalesce(),
        hybrid=torch.sparse_coo_tensor(indices[:1], torch.randn(3, 4), (2, 4)),
        nothing=torch.sparse_coo_tensor(size=(3, 4)),
        of_bool=torch.eye(3).bool().to_sparse(),
        in_int32=torch.sparse_csr_tensor(
            torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32), torch.ones(2), (2, 2)
        ),
        batched=torch.eye(4).expand(2, 4, 4).to_sparse_csr(),
    )


def nested() -> nn.Module:
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    return buffers(
        strided=torch.nested.nested_tensor(parts),
        transposed=torch.nested.nested_tensor(parts).transpose(1, 2),
        jagged=torch.nested.nested_tensor(parts, layout=torch.jagged),
    )


def conjugates() -> nn.Module:
    base = torch.randn(3, 4, dtype=torch.complex64)
    return buffers(
        base=base,
        conjugate=base.conj(),
        adjoint=base.mH,
        negative=base.conj().imag,
        real=base.real,
        pairs=torch.view_as_real(base),
        resolved=base.conj().resolve_conj(),
    )


class Adjoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
        self.register_buffer("adjoint", self.weight.detach().mH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.complex64) @ self.weight.mH) @ self.adjoint.mH


class Tagged(torch.Tensor):
    """A subclass that is a tensor like others, with a name for what it does."""


class TaggedParameter(nn.Parameter):
    pass


class Doubled(torch.Tensor):
    """A subclass that holds another tensor, as those of quantisation do."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        found = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=False)
        found.inner = inner
        return found

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [2 * arg.inner if isinstance(arg, cls) else arg for arg in args]
        return function(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Doubled, (self.inner,)


class OfSubclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("tagged", torch.randn(4).as_subclass(Tagged))
        self.tagged.unit = "m"
        self.register_buffer("over_a_weight", self.weight.detach()[0].as_subclass(Tagged))
        self.doubled = Doubled(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight + self.tagged.as_subclass(torch.Tensor)) * torch.mul(self.doubled, 1)


MODELS: Models = {
    "channels last": (lambda: convolution().to(memory_format=torch.channels_last).eval(), (IMAGE,)),
    "views": (Views, (torch.ones(2, 8),)),
    "strided": (strided, None),
    "odd addresses": (odd_addresses, None),
    "empty tensors": (empties, (torch.ones(2, 0),)),
    "unusual tensors": (unusual, None),
    **{
        str(layout).removeprefix("torch."): (lambda layout=layout: SparseLayer(layout), (X,))
        for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    },
    "sparse tensors of other kinds": (sparse_of_other_kinds, None),
    "nested tensors": (nested, None),
    "conjugates": (conjugates, None),
    "a conjugate that computes": (Adjoint, (X[:, :4],)),
    "subclasses of tensors": (OfSubclasses, (X,)),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()), None),
    "lazy, after a call": (lambda: nn.Sequential(nn.LazyLinear(3)), (X,)),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), None),
}


def test_a_subclass_keeps_its_class_its_attributes_and_its_storage() -> None:
    copy = round_trip(OfSubclasses())
    assert (type(copy.tagged), copy.tagged.unit) == (Tagged, "m")
    assert type(copy.doubled) is Doubled
    with torch.no_grad():
        copy.weight[0] = 7
    assert (copy.over_a_weight == 7).all()


def test_a_subclass_of_parameter_keeps_its_class() -> None:
    model = nn.Module()
    model.weight = TaggedParameter(torch.randn(4, 4))
    assert type(round_trip(model).weight) is TaggedParameter


def test_a_tensor_in_a_format_of_its_kernels_is_refused_with_its_name() -> None:
    with pytest.raises(SplitError, match=r"Module\.weight \(a Tensor\) cannot be taken apart"):
        split(buffers(weight=torch.randn(3, 4).to_mkldnn()))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_any_order_of_axes_and_any_step_come_back(order: tuple[int, ...], step: int) -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4).permute(order)[..., ::step]
    model = buffers(tensor=tensor, contiguous=tensor.contiguous())
    assert_same(model, round_trip(model))


def test_a_lazy_layer_is_made_in_the_copy_as_in_the_model() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    copy = round_trip(model)
    outputs = []
    for each in (model, copy):
        torch.manual_seed(3)
        outputs.append(each(X))
    assert torch.equal(*outputs)
    assert type(copy[0]) is nn.Linear
    assert_same(model, copy)


def test_a_model_on_no_device_gets_its_weights_afterwards() -> None:
    copy = round_trip(nn.Linear(3, 3, device="meta")).to_empty(device="cpu")
    assert copy.weight.device.type == "cpu"
    weights = nn.Linear(3, 3)
    copy.load_state_dict(weights.state_dict())
    assert facts(copy.weight) == facts(weights.weight)
