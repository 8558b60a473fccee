"""All models of the zoo, by kind and name, built from one seed and so the same in every process."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zoo.compare import seed
from zoo.samples import Models

KINDS = (
    "aliasing",
    "compiled",
    "dtypes",
    "flags",
    "fx",
    "hooks",
    "layers",
    "layouts",
    "main_classes",
    "outside",
    "parametrizations",
    "protocols",
    "recurrent",
    "registration",
    "scripted",
)

MODELS: Models = {
    f"{kind}: {name}": case for kind in KINDS for name, case in import_module(f"zoo.test_{kind}").MODELS.items()
}


def build(case: str) -> tuple[Any, tuple[Any, ...] | None]:
    """A model, and what to call it with."""
    seed(0)
    make, inputs = MODELS[case]
    return make(), inputs
