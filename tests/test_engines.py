"""Engines: what is refused and where, graphs by a stand-in for CUDA's, and torch.compile itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from torch import nn

import zcinfer as zc
from zcinfer import captures, device_memory, engines, loading
from zcinfer.calling import Call
from zcinfer.captures import MOST, Captured
from zcinfer.errors import OutputError, SettingsError
from zcinfer.predictor import Predictor

pytestmark = pytest.mark.usefixtures("registry")

no_gpu = pytest.mark.skipif("torch.cuda.is_available()")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(autouse=True)
def _mended() -> Iterator[None]:
    captures._failed.clear()
    yield
    captures._failed.clear()


@pytest.mark.parametrize(
    ("engine", "device", "said"),
    [
        ("fast", None, "engine is 'fast': choose one of eager, graph, compile"),
        ("graph", "cpu", "engine='graph' needs a GPU, and the model is to run on cpu: use engine='eager'"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_asked_for(engine: str, device: str | None, said: str) -> None:
    zc.put(mlp(), "mlp")
    with pytest.raises(SettingsError, match=said):
        zc.predict("mlp", normal(4, 8), engine=engine, device=device)


@no_gpu
def test_graphs_are_for_workers_that_may_have_a_gpu_and_refused_by_one_that_has_none(tmp_path: Path) -> None:
    zc.put(mlp(), "mlp")
    predictor = Predictor("mlp", engine="graph")
    with pytest.raises(SettingsError, match="engine='graph' needs a GPU"):
        predictor(normal(4, 8))
    from zcinfer.cli import main

    zarr.save_array(str(tmp_path / "x.zarr"), normal(4, 8))
    paths = [str(tmp_path / "x.zarr"), str(tmp_path / "y.zarr")]
    done = CliRunner().invoke(main, ["run", "mlp", *paths, "--engine", "graph", "--store", "file"])
    assert done.exit_code == 1
    assert "engine='graph' needs a GPU" in done.output
    assert not (tmp_path / "y.zarr").exists()


def test_an_engine_is_part_of_what_a_job_is(tmp_path: Path) -> None:
    zc.put(mlp(), "mlp")
    prints = {Predictor("mlp", engine=engine).fingerprint() for engine in engines.ENGINES}
    assert len(prints) == 3
    zarr.save_array(str(tmp_path / "x.zarr"), normal(6, 8))
    zc.run("mlp", tmp_path / "x.zarr", tmp_path / "y.zarr", progress=False)
    with pytest.raises(OutputError, match="settings"):
        zc.run("mlp", tmp_path / "x.zarr", tmp_path / "y.zarr", engine="compile", progress=False)


# Graphs. What stands for CUDA's computes its static outputs anew from its static inputs, and nothing else.


class Graphs:
    """Captures as CUDA does, without CUDA; counts captures and replays."""

    def __init__(self, fails: Exception | None = None):
        self.fails, self.captured, self.replayed = fails, 0, 0

    def __call__(
        self, function: Any, inputs: Sequence[torch.Tensor], names: tuple[str, ...]
    ) -> tuple[Callable[[], object], tuple[torch.Tensor, ...]]:
        self.captured += 1
        if self.fails is not None:
            raise self.fails
        with torch.inference_mode():
            outputs = tuple(output.clone() for output in function(inputs, names))

        def replay() -> None:
            self.replayed += 1
            with torch.inference_mode():
                for static, output in zip(outputs, function(inputs, names), strict=True):
                    static.copy_(output)

        return replay, outputs


def call_of(model: nn.Module) -> Any:
    return Call().on(model, keep_casts=False)


def test_a_shape_that_comes_again_is_replayed() -> None:
    model, graphs = mlp(), Graphs()
    captured = Captured(call_of(model), "mlp@1", graphs)
    with torch.inference_mode():
        for number in range(5):
            x = torch.randn(4, 8)
            (found,) = captured((x,), ())
            assert torch.equal(found, model(x)), number
        assert (graphs.captured, graphs.replayed) == (1, 4)
        short = torch.randn(1, 8)  # which copy_ would broadcast to the four rows of the graph
        (found,) = captured((short,), ())
        assert torch.equal(found, model(short))
        double = torch.randn(4, 8).double()
        with pytest.raises(RuntimeError):
            captured((double,), ())
    assert (graphs.captured, graphs.replayed) == (1, 4)


def test_inputs_by_name_are_another_call() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x - y

    captured = Captured(call_of(Pair()), "pair@1", Graphs())
    one, two = torch.ones(2, 1), torch.zeros(2, 1)
    for _ in range(3):
        assert captured((one, two), ())[0].tolist() == [[1], [1]]
        assert captured((two, one), ("y", "x"))[0].tolist() == [[1], [1]]


def test_graphs_are_few() -> None:
    graphs = Graphs()
    captured = Captured(call_of(mlp()), "mlp@1", graphs)
    for _ in range(2):
        for rows in range(1, MOST + 4):
            captured((torch.zeros(rows, 8),), ())
    assert graphs.captured == MOST


def test_what_cannot_be_captured_runs_eagerly_and_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    model, graphs = mlp(), Graphs(RuntimeError("operation not permitted when stream is capturing"))
    x = torch.randn(4, 8)
    with torch.inference_mode():
        for _ in range(2):  # another resident of it neither
            captured = Captured(call_of(model), "mlp@1", graphs)
            for _ in range(4):
                assert torch.equal(captured((x,), ())[0], model(x))
    assert graphs.captured == 1
    assert caplog.text.count("no CUDA graph of mlp@1 could be captured (RuntimeError: operation not permitted") == 1


def test_a_capture_after_which_nothing_is_answered_is_told() -> None:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error.error_code = 700
    captured = Captured(call_of(mlp()), "mlp@1", Graphs(error))
    captured((torch.zeros(4, 8),), ())
    with pytest.raises(torch.AcceleratorError):
        captured((torch.zeros(4, 8),), ())


def test_no_memory_is_given_back_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's allocator fails, then, for whichever thread asks."""
    held: list[bool] = []

    def look() -> None:
        with ThreadPoolExecutor(1) as other:
            free = other.submit(device_memory.capturing.acquire, blocking=False).result()
            if free:
                other.submit(device_memory.capturing.release).result()
        held.append(not free)

    monkeypatch.setattr(torch.cuda, "empty_cache", look)
    device_memory.give_back(torch.device("cuda"))

    def capture(function: Any, inputs: Sequence[torch.Tensor], names: tuple[str, ...]) -> Any:
        look()
        return Graphs()(function, inputs, names)

    captured = Captured(call_of(mlp()), "mlp@1", capture)
    for _ in range(2):
        captured((torch.zeros(4, 8),), ())
    look()
    assert held == [True, True, False]


def test_graphs_end_with_their_module() -> None:
    zc.put(mlp(), "mlp")
    ref, call = Predictor("mlp").ref, Call(output=lambda y, _: y * 2)
    with loading.residents.lend(ref, "cpu", "refuse") as model:
        function = engines.function_of("graph", model, call, ref, torch.device("cpu"))
        assert engines.function_of("graph", model, call, ref, torch.device("cpu")) is function
        assert engines.function_of("graph", model, Call(), ref, torch.device("cpu")) is not function
        for number in range(10):
            engines.function_of("graph", model, Call(constants={"n": number}), ref, torch.device("cpu"))
        assert len(loading.made_of(model)) == engines._CALLS
    with loading.residents.lend(ref, "cpu", "refuse") as again:
        assert again is model
    del model, again
    import gc
    import weakref

    alive = weakref.ref(next(iter(loading._by_module.values())))
    loading.residents.clear()
    gc.collect()
    assert alive() is None


# torch.compile


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without C++, which takes half a minute: what torch makes of a module is traced all the same."""
    engines.no_compiler.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    engines.no_compiler.cache_clear()
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiled")
def test_without_a_compiler_it_is_refused() -> None:
    from torch._inductor import config

    zc.put(mlp(), "mlp")
    said = r"needs a compiler on each worker's machine: .*Debian: g\+\+"
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(SettingsError, match=said) as caught:
        zc.predict("mlp", normal(4, 8), engine="compile", device="cpu")
    assert "use engine='eager'" in str(caught.value)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its own modules
def test_compiled_code_computes_the_same_and_leaves_the_module_to_others(caplog: pytest.LogCaptureFixture) -> None:
    zc.put(mlp(), "mlp")
    x = normal(48, 8)  # whole batches: another shape would be compiled, too
    eager = zc.predict("mlp", x, batch_size=8, device="cpu")
    for _ in range(2):
        found = zc.predict("mlp", x, batch_size=8, engine="compile", device="cpu")
        assert np.allclose(found, eager, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # it was compiled
    ref = Predictor("mlp").ref
    with loading.residents.lend(ref, "cpu", "refuse") as model:
        assert [*loading.made_of(model)] == [("compile", "forward")]
        assert type(model) is nn.Sequential
    assert np.array_equal(zc.predict("mlp", x, batch_size=8, device="cpu"), eager)
    assert "wrote to its own weights" not in caplog.text


class Methods(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def double(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its own modules
def test_another_method_is_compiled() -> None:
    zc.put(Methods().eval(), "methods")
    x = normal(8, 2)
    found = zc.predict("methods", x, method="double", engine="compile", batch_size=4, device="cpu")
    assert np.array_equal(found, x * 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
