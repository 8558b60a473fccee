"""The layers that torch itself has, all of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from zoo.compare import compared, round_trip
from zoo.samples import IMAGE, TOKENS, Models, X, convolution, mlp, ran


def trained() -> nn.Module:
    model = mlp()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimiser.step()
    return model


class Cached(nn.Module):
    """Keys and values of the rows so far, in a buffer that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("keys", torch.zeros(32, 4), persistent=False)
        self.length = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        self.keys[self.length : self.length + len(x)] = y.detach()
        self.length += len(x)
        return y @ self.keys[: self.length].t()


# What a layer of torch cannot be made without, by the name of the argument.
WANTED: dict[str, Any] = {
    **dict.fromkeys(("num_features", "in_features", "in1_features", "in2_features", "in_channels", "input_size"), 4),
    **dict.fromkeys(("out_channels", "num_channels", "normalized_shape", "embed_dim", "embedding_dim", "d_model"), 4),
    **dict.fromkeys(("out_features", "hidden_size"), 3),
    **dict.fromkeys(("kernel_size", "num_groups", "groups", "num_heads", "nhead", "output_size", "num_layers"), 2),
    **dict.fromkeys(("upscale_factor", "downscale_factor", "size", "norm_type", "scale_factor"), 2),
    **dict.fromkeys(("dim", "padding", "threshold", "num_chunks"), 1),
    **dict.fromkeys(("num_embeddings", "n_classes", "num_classes"), 9),
    "unflattened_size": (2, 2),
    "cutoffs": [3, 6],
    "value": 0.2,
    "bias": True,
    "mode": "GRU",
}
# Those that need what their arguments do not tell.
ALSO: dict[str, dict[str, Any]] = {
    **{name: {"input_size": 4, "hidden_size": 3} for name in ("LSTM", "GRU", "RNN")},
    **{f"FractionalMaxPool{n}d": {"output_size": 2} for n in (2, 3)},
    **{name: {"scale_factor": 2} for name in ("Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d")},
    "Fold": {"output_size": (4, 4), "kernel_size": 2},
    "Transformer": {"d_model": 4, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 8},
}
ALL = {name: kind for name, kind in sorted(vars(nn).items()) if isinstance(kind, type) and issubclass(kind, nn.Module)}
LAYERS = {name: kind for name, kind in ALL.items() if name not in ("Module", "Container")}  # the bases of all


def made(name: str) -> nn.Module:
    kind = LAYERS[name]
    if name in ("TransformerEncoder", "TransformerDecoder"):
        layer = made(f"{name}Layer")
        return kind(layer, 2)
    if name == "DataParallel":
        return kind(nn.Linear(4, 4))
    parameters = inspect.signature(kind).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in parameters if p.default is p.empty and p.kind not in variable]
    return kind(**({wanted: WANTED[wanted] for wanted in names} | ALSO.get(name, {})))


def guesses(layer: nn.Module) -> Iterator[tuple[torch.Tensor, ...]]:
    """What the layer might be called with: a tensor for each argument it cannot do without."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(layer.forward).parameters.values()
    count = sum(p.default is p.empty and p.kind not in variable for p in parameters)
    random = torch.Generator().manual_seed(1)
    for shape in [(5, 4), (2, 4, 8), (2, 4, 8, 8), (2, 4, 8, 8, 8), (1, 16, 9)]:
        yield (torch.rand(shape, generator=random),) * count
    yield (TOKENS[0],) * count
    yield (TOKENS,) * count
    yield (torch.rand(5, 4, generator=random), torch.tensor([0, 1, 2, 3, 0]))
    yield (torch.rand(2, 5, 4, generator=random), torch.randint(16, (2, 5, 4), generator=random))
    yield (torch.rand(2, 5, 4, 4, generator=random), torch.randint(16, (2, 5, 4, 4), generator=random))


def all_layers() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that torch means to change
        return nn.ModuleDict({f"a {name}": made(name) for name in LAYERS})


MODELS: Models = {
    "mlp": (mlp, (X,)),
    "no tensors": (nn.ReLU, (X,)),
    "convolution and norm in train mode": (convolution, (IMAGE,)),
    "convolution and norm in eval mode": (lambda: ran(convolution(), IMAGE).eval(), (IMAGE,)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), (X[None],)),
    "attention with heads of other widths": (lambda: nn.MultiheadAttention(4, 2, kdim=4, vdim=4), (X, X, X)),
    "a transformer": (
        lambda: nn.Transformer(4, 2, 2, 2, 8, batch_first=True).eval(),
        (X[None], X[None]),
    ),
    "a norm of embeddings": (lambda: nn.Embedding(10, 4, max_norm=0.1), (TOKENS,)),
    "a cache of keys": (Cached, (X,)),
    "trained": (trained, (X,)),
    "every layer of torch": (all_layers, None),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_every_layer_of_torch_comes_back_and_computes_the_same() -> None:
    wrong, called = {}, 0
    for name in LAYERS:
        torch.manual_seed(0)
        layer = made(name)
        inputs = next((given for given in guesses(layer) if _takes(layer, given)), None)
        torch.manual_seed(0)
        layer = made(name)  # anew: the call has written to it, perhaps
        called += inputs is not None
        differing = compared(layer, round_trip(layer), inputs)
        if differing:
            wrong[name] = differing
    assert wrong == {}
    assert len(LAYERS) >= 160
    assert called >= 145


def _takes(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> bool:
    try:
        with torch.no_grad():
            layer(*inputs)
    except Exception:  # whatever the kernels raise of inputs that are only guessed
        return False
    return True
