"""Weights that are worked out from others: parametrizations, norms old and new, pruning."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from zoo.compare import assert_same, outputs, round_trip, seed
from zoo.samples import IMAGE, TOKENS, Models, X, mlp, ran


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu()


class Scaled(nn.Module):
    """One with a weight and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1) + 1)
        self.register_buffer("shift", torch.rand(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift


class Split(nn.Module):
    """One weight from two."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ right

    def right_inverse(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.clone(), torch.eye(x.shape[1])


class Own(nn.Linear):
    """A class of the user's, with a method that uses the parametrized weight."""

    def norm(self) -> torch.Tensor:
        return self.weight.norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.norm()


def several_on_one_weight() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parametrize.register_parametrization(layer, "weight", Scaled())
    parametrize.register_parametrization(layer, "bias", Scaled())
    return layer


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def one_for_two() -> nn.Module:
    model, shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Scaled()
    for layer in model:
        parametrize.register_parametrization(layer, "weight", shared)
    return model


def tied_originals() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for layer in model:
        parametrize.register_parametrization(layer, "weight", Scaled())
    return model


def parametrized(layer: nn.Module, with_: nn.Module, name: str = "weight") -> nn.Module:
    parametrize.register_parametrization(layer, name, with_)
    return layer


def pruned(how: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    if how == "by size":
        prune.l1_unstructured(model[0], "weight", 0.5)
        prune.random_unstructured(model[0], "bias", 2)
    elif how == "by rows":
        prune.ln_structured(model[0], "weight", 2, n=2, dim=0)
    elif how == "twice":
        prune.random_unstructured(model[0], "weight", 0.3)
        prune.l1_unstructured(model[0], "weight", 0.3)
    elif how == "by a mask":
        prune.custom_from_mask(model[0], "weight", torch.rand(6, 4) > 0.5)
    elif how == "everywhere":
        prune.global_unstructured([(model[0], "weight"), (model[2], "weight")], prune.L1Unstructured, amount=0.5)
    else:
        prune.l1_unstructured(model[0], "weight", 0.5)
        prune.remove(model[0], "weight")
    return model


MODELS: Models = {
    "parametrized by weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), (X,)),
    "parametrized by spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), (X,)),
    "parametrized by spectral_norm, in eval mode": (
        lambda: ran(parametrizations.spectral_norm(nn.Linear(4, 3)), X).eval(),
        (X,),
    ),
    "parametrized by orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), (X,)),
    "parametrized by orthogonal, by Cayley's map": (
        lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley", use_trivialization=False),
        (X,),
    ),
    "parametrized within": (lambda: nn.Sequential(mlp(), parametrizations.weight_norm(nn.Linear(2, 2))), (X,)),
    "parametrized twice": (
        lambda: parametrizations.weight_norm(parametrizations.spectral_norm(nn.Linear(4, 3)), "bias", dim=None),
        (X,),
    ),
    "several on one weight": (several_on_one_weight, (X,)),
    "on a buffer": (lambda: parametrized(Buffered(), Scaled(), "scale"), (X,)),
    "one for two layers": (one_for_two, (X,)),
    "tied originals": (tied_originals, (X,)),
    "one weight from two": (lambda: parametrized(nn.Linear(4, 4), Split()), (X,)),
    "a class of the user's": (lambda: parametrized(Own(4, 4), Symmetric()), (X,)),
    "a parametrized parametrization": (
        lambda: parametrized(nn.Linear(4, 4), parametrized(Scaled(), Scaled(), "scale")),
        (X,),
    ),
    "parametrized, with a hook": (
        lambda: _with_hook(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
        (IMAGE,),
    ),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), (X,)),
    "old weight_norm, called": (lambda: ran(nn.utils.weight_norm(nn.Linear(4, 3)), X), (X,)),
    "old weight_norm of a convolution": (lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3), dim=None), (IMAGE,)),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), (X,)),
    "old spectral_norm of an embedding": (lambda: nn.utils.spectral_norm(nn.Embedding(10, 4)), (TOKENS,)),
    "old spectral_norm, in eval mode": (lambda: ran(nn.utils.spectral_norm(nn.Linear(4, 3)), X).eval(), (X,)),
    **{
        f"pruned {how}": ((lambda how=how: pruned(how)), (X,))
        for how in ("by size", "by rows", "twice", "by a mask", "everywhere", "for good")
    },
}


def _with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output * module.weight.sum())
    return layer


def test_parametrizations_can_be_removed_from_the_copy() -> None:
    model = parametrizations.weight_norm(nn.Linear(4, 3))
    other = round_trip(model)
    expected = model(X)
    assert type(other).__bases__ == (nn.Linear,)
    parametrize.remove_parametrizations(other, "weight")
    assert type(other) is nn.Linear
    assert torch.equal(other(X), expected)


@pytest.mark.parametrize("case", ["one weight from two", "a class of the user's"])
def test_a_parametrized_weight_of_the_copy_can_be_set(case: str) -> None:
    seed(0)
    model = MODELS[case][0]()
    copy = round_trip(model)
    with torch.no_grad():
        model.weight = copy.weight = torch.eye(4) * 3
    assert torch.equal(copy.weight, torch.eye(4) * 3)
    assert_same(model, copy)


def test_parametrized_weights_of_the_copy_are_cached_where_asked() -> None:
    copy = round_trip(several_on_one_weight())
    with parametrize.cached():
        assert copy.weight is copy.weight
    assert copy.weight is not copy.weight


def test_old_norms_can_be_removed_from_the_copy() -> None:
    for add, remove in (
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    ):
        torch.manual_seed(0)
        model = ran(add(nn.Linear(4, 3)), X).eval()
        copy = round_trip(model)
        assert_same(remove(model), remove(copy))
        assert outputs(copy, (X,)).found == outputs(model, (X,)).found


def test_pruning_can_be_made_final_in_the_copy() -> None:
    torch.manual_seed(0)
    model = pruned("by size")
    copy = round_trip(model)
    for each in (model, copy):
        prune.remove(each[0], "weight")
    assert not prune.is_pruned(copy[2])
    assert_same(model, copy)
    assert (copy[0].weight == 0).sum() == 12
