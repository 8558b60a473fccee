"""PyTorch inference over big arrays: Dask schedules blocks, Ray's shared memory holds the weights once per machine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors
from .errors import ZcinferError

if TYPE_CHECKING:
    from .arrays import predict, predict_by
    from .catalog import connect, delete, disconnect, models
    from .cluster import LocalCluster
    from .jobs import run
    from .predictor import Predictor
    from .prefetching import prefetch
    from .publishing import load, put, save
    from .records import failures
    from .reporting import report
    from .store import ModelRef
    from .windowing import windows

# Name: module it is in. Loaded when first used, so that `import zcinfer` costs nothing.
_HOME = {
    "LocalCluster": "cluster",
    "ModelRef": "store",
    "Predictor": "predictor",
    "connect": "catalog",
    "delete": "catalog",
    "disconnect": "catalog",
    "failures": "records",
    "load": "publishing",
    "models": "catalog",
    "predict": "arrays",
    "predict_by": "arrays",
    "prefetch": "prefetching",
    "put": "publishing",
    "report": "reporting",
    "run": "jobs",
    "save": "publishing",
    "windows": "windowing",
}

__version__ = "0.1.0"
__all__ = [
    "LocalCluster",
    "ModelRef",
    "Predictor",
    "ZcinferError",
    "connect",
    "delete",
    "disconnect",
    "errors",
    "failures",
    "load",
    "models",
    "predict",
    "predict_by",
    "prefetch",
    "put",
    "report",
    "run",
    "save",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zcinfer' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
