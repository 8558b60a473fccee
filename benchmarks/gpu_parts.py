"""Parts of the GPU benchmark that one process does: what the card can, models of the size of BERT-base and ResNet-50,
their loads, and windows of strain. Not for jobs side by side (`gpu_jobs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import zcinfer as zc
from zcinfer.loading import residents

from .gpu_jobs import Array, Job
from .measure import interleaved, summary


def wait(device: torch.device) -> None:
    """Wait until the device has done all."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def per_second(work: Callable[[], object], device: torch.device, amount: float, rounds: int = 5) -> float:
    """The best of some rounds: what a limit is."""
    work()
    wait(device)
    times = []
    for _ in range(rounds):
        begin = perf_counter()
        work()
        wait(device)
        times.append(perf_counter() - begin)
    return amount / min(times)


def limits(job: Job, copied: int, side: int, launches: int) -> dict[str, float]:
    """Bytes/s over the bus from and to pinned memory, operations/s of a matrix product, kernels/s, the talk's rows/s.

    Parameters
    ----------
    copied : int
        Bytes of a copy.
    side : int
        Of the matrices.
    launches : int
    """
    device, found = job.device, {}
    pinned = torch.empty(copied, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(copied, dtype=torch.uint8, device=device)
    found["pinned copy in"] = per_second(lambda: there.copy_(pinned, non_blocking=True), device, copied)
    found["pinned copy out"] = per_second(lambda: pinned.copy_(there, non_blocking=True), device, copied)
    pageable = torch.empty(copied, dtype=torch.uint8)
    found["pageable copy in"] = per_second(lambda: there.copy_(pageable), device, copied)
    for name in "float32", "bfloat16":
        a = torch.randn(side, side, dtype=getattr(torch, name), device=device)
        found[f"matrix product, {name}"] = per_second(lambda a=a: a @ a, device, 2.0 * side**3)  # type: ignore[misc]
    one = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(launches):
            one.zero_()

    found["kernel launches"] = per_second(launch, device, launches)
    return found


def resident(job: Job, rows: Sequence[int], most: int) -> dict[str, float]:
    """Rows/s of the talk's module on data that is on the device, by rows of a batch; of ``most`` forwards at most."""
    model = torch.load(job.directory / "model.pt", weights_only=False).to(job.device)
    found = {}
    with torch.inference_mode():
        for count in rows:
            x = torch.randn(count, 64, device=job.device)
            times = max(1, min(most, (1 << 20) // count))

            def work(x: torch.Tensor = x, times: int = times) -> None:
                for _ in range(times):
                    model(x)

            found[str(count)] = per_second(work, job.device, count * times)
    return found


class Encoder(nn.Module):
    """torch's own encoder of the size of BERT-base, so that no other package is needed."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12, words: int = 30_522):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(512, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = self.places.weight[: ids.shape[1]]
        output: torch.Tensor = self.encoder(self.words(ids) + places).mean(1)
        return output


class Bottleneck(nn.Module):
    def __init__(self, inner: int, outer: int, width: int, stride: int):
        super().__init__()
        self.first, self.second, self.third = (
            nn.Sequential(nn.Conv2d(a, b, k, s, k // 2, bias=False), nn.BatchNorm2d(b))
            for a, b, k, s in ((inner, width, 1, 1), (width, width, 3, stride), (width, outer, 1, 1))
        )
        same = inner == outer and stride == 1
        shortcut = [nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.second(F.relu(self.first(x))))
        return F.relu(self.third(y) + self.shortcut(x))


def residual(depths: Sequence[int] = (3, 4, 6, 3), width: int = 64) -> nn.Module:
    """ResNet-50 (He et al., 2015; stride in the 3 by 3 convolution)."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inner = width
    for stage, depth in enumerate(depths):
        here = width << stage
        for number in range(depth):
            layers.append(Bottleneck(inner, 4 * here, here, 2 if stage and not number else 1))
            inner = 4 * here
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, 1000))


def build(name: str, small: bool) -> tuple[nn.Module, tuple[int, ...], torch.dtype]:
    """The model from a fixed seed, the shape of its rows, and their dtype."""
    torch.manual_seed(0)
    if name == "BERT-base":
        model: nn.Module = Encoder(2, 32, 2, 100) if small else Encoder()
        return model.eval(), (16,) if small else (128,), torch.int64
    model = residual((1, 1), 8) if small else residual()
    return model.eval(), (3, 32, 32) if small else (3, 224, 224), torch.float32


def rows_of(shape: tuple[int, ...], dtype: torch.dtype, rows: int) -> Array:
    """Rows of it: small numbers of words, or noise."""
    random = np.random.default_rng(0)
    if dtype == torch.int64:
        return random.integers(0, 100, (rows, *shape))
    return random.normal(size=(rows, *shape)).astype(np.float32)


def publish(job: Job, name: str, small: bool) -> int:
    """Put the model; its bytes."""
    model, _, _ = build(name, small)
    torch.save(model, job.directory / f"{name}.pt")
    return int(zc.put(model, name).nbytes)


def model_rates(job: Job, name: str, small: bool, batch: int, batches: int, rounds: int) -> dict[str, Any]:
    """Rows/s of ours by each engine that there is, and of a loop written by hand, in turn."""
    model, shape, dtype = build(name, small)
    x = rows_of(shape, dtype, batch * batches)
    by_hand = hand_written(model.to(job.device), torch.from_numpy(x), batch, job.device)
    ways: dict[str, Callable[[], Array]] = {"by hand": by_hand}
    for engine in ("eager", "graph") if job.device.type == "cuda" else ("eager",):
        predictor = zc.Predictor(name, batch_size=batch, engine=engine, device=str(job.device))
        ways[f"zcinfer, {engine}"] = lambda predictor=predictor: predictor(x)  # type: ignore[misc]
    expected = by_hand().copy()
    for way, work in ways.items():
        if not np.allclose(work(), expected, rtol=1e-2, atol=1e-3):
            raise RuntimeError(f"{name}, {way}: another result than that of the loop by hand")
    found = interleaved(ways, rounds)
    return {way: summary([len(x) / seconds for seconds in times]) for way, times in found.items()}


def hand_written(model: nn.Module, x: torch.Tensor, batch: int, device: torch.device) -> Callable[[], Array]:
    """A loop that replays one CUDA graph on rows that are in pinned memory already; on the CPU, a plain loop."""
    if device.type != "cuda":

        def plain() -> Array:
            with torch.inference_mode():
                return np.concatenate([model(part).numpy() for part in torch.split(x, batch)])

        return plain
    x = x.pin_memory()
    static = x[:batch].to(device)
    with torch.no_grad():
        aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                model(static)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(static)
    result = torch.empty((len(x), *output.shape[1:]), pin_memory=True)

    def work() -> Array:
        for start in range(0, len(x), batch):
            static.copy_(x[start : start + batch], non_blocking=True)
            graph.replay()
            result[start : start + batch].copy_(output, non_blocking=True)
        torch.cuda.synchronize()
        return result.numpy()

    return work


def cuda_loads(job: Job, name: str, rounds: int) -> dict[str, Any]:
    """Seconds of ``model.to(device)`` from pageable memory, of a pinned copy of as many bytes, and of ours."""
    ref = zc.Predictor(name).ref
    pinned = torch.empty(ref.nbytes, dtype=torch.uint8, pin_memory=job.device.type == "cuda")
    there = torch.empty(ref.nbytes, dtype=torch.uint8, device=job.device)
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        fresh = torch.load(job.directory / f"{name}.pt", weights_only=False)
        ways: dict[str, Callable[[], Any]] = {
            "model.cuda() from pageable memory": lambda fresh=fresh: fresh.to(job.device),  # type: ignore[misc]
            "pinned copy of as many bytes": lambda: there.copy_(pinned, non_blocking=True),
            "zcinfer, first job": lambda: zc.load(name, device=str(job.device)),
        }
        for way, work in ways.items():
            wait(job.device)
            begin = perf_counter()
            result = work()
            wait(job.device)
            seconds.setdefault(way, []).append(perf_counter() - begin)
            del result
    return {way: summary(times) for way, times in seconds.items()}


def hold(job: Job, name: str) -> None:
    """Keep the model on the device, as a job that shares it does; and a small one."""
    zc.put(nn.Linear(1024, 1024).eval(), "once")
    for each in "once", name:
        _lend(job, each)


def second_load(job: Job, name: str) -> dict[str, float]:
    """Seconds and bytes of the device that a load takes while another job has the model there and shares it."""
    _lend(job, "once")  # what a process pays once is not the model's
    wait(job.device)
    free = torch.cuda.mem_get_info(job.device)[0] if job.device.type == "cuda" else 0
    begin = perf_counter()
    _lend(job, name)
    wait(job.device)
    seconds = perf_counter() - begin
    left = torch.cuda.mem_get_info(job.device)[0] if job.device.type == "cuda" else 0
    return {"seconds": seconds, "bytes": free - left}


def _lend(job: Job, name: str) -> None:
    """What a job's blocks are lent: `zc.load` gives a copy, which its user may write to."""
    lent = residents.lend(zc.Predictor(name).ref, str(job.device), "refuse")
    lent.__enter__()
    job.kept.append(lent)


def strain(job: Job, seconds: float, rounds: int) -> dict[str, float]:
    """Seconds of two detectors' data (4096 Hz) that are searched in a second, by windows of 3/4 s every 1/8 s."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inner, outer in ((2, 16), (16, 32), (32, 64)):
        layers += [nn.Conv1d(inner, outer, 16, 4), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 1)).eval()
    zc.put(model, "strain")
    x = np.random.default_rng(0).normal(size=(2, int(seconds * 4096))).astype(np.float32)
    # A view: what `zc.windows` shows of an array in a task, which needs zarr.
    windows = np.lib.stride_tricks.sliding_window_view(x, 3072, axis=1)[:, ::512].transpose(1, 0, 2)
    predictor = zc.Predictor("strain", device=str(job.device))
    zc.predict(predictor, windows)
    times = []
    for _ in range(rounds):
        begin = perf_counter()
        zc.predict(predictor, windows)
        times.append(perf_counter() - begin)
    return summary([seconds / took for took in times])
