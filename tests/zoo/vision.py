"""Small architectures of timm, two of each of its modules; run as a program, what came of a share, as JSON.

A program of its own, since timm needs torchvision, whose builds are for torch's CUDA builds: beside another one it
can only be imported with a hand, and to have it where other packages find it breaks these, as transformers.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from zoo.compare import seed
from zoo.sweep import tell, through_the_store

# Where `make test-slow` puts timm, and what that needs and nothing else has.
PLACE = Path(sys.prefix) / "timm"
CHOSEN = Path(__file__).with_name("vision.json")

MOST_PARAMETERS = 45_000_000
SMALL = 6_000_000  # left as they are
# What makes larger ones small: fewer layers, in the words of different modules.
SHORTER: list[dict[str, Any]] = [
    {},
    {"depth": 2},
    *({"depths": [1] * length} for length in (4, 3, 2)),
    *({"layers": [1] * length} for length in (4, 3)),
    {"depths": [1, 2, 1]},
]
CLASSES, IMAGES = 10, (64, 96, 128)


def import_timm() -> Any:
    if str(PLACE) not in sys.path:
        sys.path.append(str(PLACE))  # at the end: what is installed for all comes first
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # its library cannot be loaded, and so it misses the operators that it goes on to describe
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


def build(name: str, shorter: dict[str, Any]) -> Module:
    """A model in eval mode; each of its weights, also biases and norms, has values of its own."""
    seed(0)
    model: Module = import_timm().create_model(name, pretrained=False, num_classes=CLASSES, **shorter).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.is_contiguous():
                tensor.add_(torch.rand_like(tensor), alpha=0.01)
    return model


def guesses(model: Any) -> Iterator[dict[str, Any]]:
    """Batches of two images, the smallest first; some take but one size."""
    channels, *usual = model.default_cfg["input_size"]
    for size in (*((size, size) for size in IMAGES), usual):
        yield {"x": torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1))}


def choose() -> list[tuple[str, str, dict[str, Any]]]:
    """Of each module of timm the smallest model, and the smallest whose name begins with another word."""
    timm = import_timm()
    from timm.models._registry import _model_to_module

    found: dict[str, list[tuple[int, str, dict[str, Any]]]] = defaultdict(list)
    for name in timm.list_models():
        for shorter in SHORTER:
            with suppress(Exception), torch.device("meta"):  # most modules know but one of these words
                model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **shorter).eval()
                model(torch.empty(2, *model.default_cfg["input_size"]))
                size = sum(parameter.numel() for parameter in model.parameters())
                found[_model_to_module[name]].append((size, name, shorter))
                if size <= SMALL:
                    break
    chosen = []
    for module, models in sorted(found.items()):
        models.sort(key=lambda model: model[:2])
        word = _first_word(models[0][1])
        others = [model for model in models if _first_word(model[1]) != word]
        more = others or [model for model in models if model[1] != models[0][1]]
        chosen += [(module, *model[1:]) for model in (models[0], *more[:1]) if model[0] <= MOST_PARAMETERS]
    return chosen


def _first_word(name: str) -> str:
    return re.split("[^a-z]", name)[0]


if __name__ == "__main__":
    if sys.argv[1:] == ["choose"]:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        lines = ",\n".join(json.dumps(model) for model in choose())
        CHOSEN.write_text(f"[\n{lines}\n]\n")
    else:
        import_timm()
        shorter = {name: words for _, name, words in json.loads(CHOSEN.read_text())}
        tell([*shorter], lambda name: through_the_store(partial(build, name, shorter[name]), guesses))
