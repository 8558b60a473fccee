"""The work of the throughput benchmark: models, their inputs in ``.npy`` files, and where the results go.

The same for all systems (`systems`): each reads rows of memory maps and writes rows of one. Not for how they do it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import nn

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """A model and what it is applied to.

    Attributes
    ----------
    build : callable
        Gives the model, in eval mode.
    make : callable
        Writes the inputs of that many rows into a directory: ``NAME.npy`` for each of ``inputs``.
    inputs : tuple of str
        Names by which the model takes them.
    rows, quick_rows : int
        Of a whole run, and of one that shows that it works.
    batches : tuple of int
        Sizes tried.
    width : int
        Columns of the output, which is float32.
    output : callable
        ``f(what the model gave, its inputs) -> tensor (rows, width)``.
    unit : str
        What a row is.
    """

    build: Callable[[], nn.Module]
    make: Callable[[Path, int], None]
    inputs: tuple[str, ...]
    rows: int
    quick_rows: int
    batches: tuple[int, ...]
    width: int
    output: Callable[[Any, Tensors], torch.Tensor]
    unit: str


# The talk's network.


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 1)).eval()


def features(directory: Path, rows: int) -> None:
    generator = np.random.default_rng(0)
    file = np.lib.format.open_memmap(directory / "input.npy", mode="w+", dtype=np.float32, shape=(rows, 64))
    for start in range(0, rows, 1 << 18):
        part = file[start : start + (1 << 18)]
        generator.random(dtype=np.float32, out=part)
    file.flush()


def as_it_is(output: Any, inputs: Tensors) -> torch.Tensor:
    tensor: torch.Tensor = output
    return tensor


# The demo's encoder, over the demo's text.

TOKENS = 64


def encoder() -> nn.Module:
    from transformers import BertModel

    from zcinfer.corpus import model_directory

    model: nn.Module = BertModel.from_pretrained(str(model_directory()))
    return model.eval()


def text(directory: Path, rows: int) -> None:
    from zcinfer.corpus import passages, tokenise

    found = tokenise([passage.text for passage in passages()], TOKENS)
    for name, array in found.items():
        np.save(directory / f"{name}.npy", np.resize(array, (rows, TOKENS)))  # from the first again, after the last


def pooled_tokens(output: Any, inputs: Tensors) -> torch.Tensor:
    from zcinfer.corpus import embed_pool

    return embed_pool(output, inputs)


# Images.


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    sizes = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "embedding_size": 64}
    model: nn.Module = ResNetModel(ResNetConfig(layer_type="basic", **sizes))
    return model.eval()


def images(directory: Path, rows: int) -> None:
    array = np.random.default_rng(0).random((rows, 3, 224, 224), dtype=np.float32)
    np.save(directory / "pixel_values.npy", array)


def pooled_pixels(output: Any, inputs: Tensors) -> torch.Tensor:
    pooled: torch.Tensor = output.pooler_output
    return pooled.flatten(1)


# No compute: what the systems themselves cost.


class Sleep(nn.Module):
    """Sleeps for a batch, as in ray-project/ray issue 44905: one second for 1,000 rows."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:  # and not one of those that only find shapes
            time.sleep(self.seconds)
        return x[:, :1] * 1


SLEEP_ROWS = 1000


def sleeper() -> nn.Module:
    return Sleep(1.0).eval()


def columns(directory: Path, rows: int) -> None:
    np.save(directory / "x.npy", np.random.default_rng(0).random((rows, 4), dtype=np.float32))


WORKLOADS = {
    "MLP": Workload(
        mlp, features, ("input",), 10_000_000, 500_000, (256, 512, 1024, 2048, 4096, 8192), 1, as_it_is, "rows"
    ),
    "MiniLM": Workload(
        encoder, text, ("input_ids", "attention_mask"), 512, 64, (4, 8, 16, 32, 64), 384, pooled_tokens, "passages"
    ),
    "ResNet-18": Workload(
        resnet, images, ("pixel_values",), 192, 16, (1, 2, 4, 8, 16, 32), 512, pooled_pixels, "images"
    ),
    "sleep": Workload(sleeper, columns, ("x",), 20_000, 2_000, (SLEEP_ROWS,), 1, as_it_is, "rows"),
}


def prepare(name: str, directory: str, rows: int) -> dict[str, Any]:
    """Write the inputs, and the model: as a file of torch's, and published in a registry of the benchmark's own."""
    import zcinfer as zc

    workload, place = WORKLOADS[name], Path(directory)
    workload.make(place, rows)
    model = workload.build()
    torch.save(model, place / "model.pt")
    zc.connect("file")
    ref = zc.put(model, name)
    return {"nbytes": ref.nbytes, "input_nbytes": sum((place / f"{n}.npy").stat().st_size for n in workload.inputs)}


# What a system is asked to do, and what it does it with.


@dataclass(frozen=True)
class Task:
    """One run of one system.

    Attributes
    ----------
    workload, directory : str
        What, and where `prepare` has put it.
    output, records : str
        The ``.npy`` file that exists and is to be written to, and a directory for the times of the blocks.
    rows, block, batch : int
        Rows in all, of what is read and written at a time, and of one forward.
    processes, threads : int
        That compute; threads of each.
    framework_batch : int
        Rows that Ray Data gives to an actor at a time.
    warm : bool
        Do a little of it first, where that can be done.
    """

    workload: str
    directory: str
    output: str
    records: str
    rows: int
    block: int
    batch: int
    processes: int
    threads: int = 1
    framework_batch: int = 0
    warm: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Workload:
        return WORKLOADS[self.workload]

    @property
    def starts(self) -> Sequence[int]:
        return range(0, self.rows, self.block)

    @property
    def paths(self) -> dict[str, str]:
        """The file of each input."""
        return {name: f"{self.directory}/{name}.npy" for name in self.work.inputs}

    def read(self, start: int, stop: int) -> dict[str, Array]:
        """Rows of all inputs: views of the page cache."""
        return {name: mapped(path, "c")[start:stop] for name, path in self.paths.items()}

    def write(self, start: int, result: Array) -> None:
        """Put rows where they go, and note when that was."""
        mapped(self.output, "r+")[start : start + len(result)] = result
        note(self.records, start, len(result))

    def model(self) -> nn.Module:
        """A model of this process's own."""
        model: nn.Module = torch.load(f"{self.directory}/model.pt", weights_only=False)
        return model

    def run(self, model: nn.Module, blocks: Mapping[str, Array]) -> Array:
        """What everybody would write: batch after batch, without copies of what is read."""
        work = self.work
        rows = len(next(iter(blocks.values())))
        result = np.empty((rows, work.width), np.float32)
        with torch.inference_mode():
            for start in range(0, rows, self.batch):
                cut = slice(start, start + self.batch)
                tensors = {name: torch.from_numpy(block[cut]) for name, block in blocks.items()}
                result[cut] = work.output(model(**tensors), tensors).numpy()
        return result


@cache
def mapped(path: str, mode: Any) -> Array:
    """A file, mapped once in a process. ("c" writes nothing back, and torch takes it without a warning.)"""
    found: Array = np.load(path, mmap_mode=mode)
    return found


@cache
def _records(directory: str, pid: int) -> TextIO:
    return open(f"{directory}/{pid}", "a", buffering=1)


def note(directory: str, start: int, rows: int) -> None:
    """Note that this process has finished some rows now, and the seconds of processors that it has used so far."""
    _records(directory, os.getpid()).write(f"{time.monotonic()} {start} {rows} {time.process_time()}\n")


class Npy:
    """An input as dask slices it: opened where it is read."""

    def __init__(self, path: str):
        array = mapped(path, "c")
        self.path, self.shape, self.dtype, self.ndim = path, array.shape, array.dtype, array.ndim

    def __getitem__(self, index: Any) -> Array:
        return np.asarray(mapped(self.path, "c")[index])

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("Npy", self.path)


class Target:
    """The output as ``dask.array.store`` writes to it."""

    def __init__(self, task: Task):
        self.task, self.shape, self.dtype = task, (task.rows, task.work.width), np.dtype(np.float32)

    def __setitem__(self, index: Any, block: Array) -> None:
        self.task.write(index[0].start or 0, block)
