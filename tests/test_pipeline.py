"""Blocks through a model as on a GPU, on the CPU: the same results, the same errors, and no race between streams."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from streams import Recorder
from torch import nn

import zcinfer as zc
from zcinfer import lanes, pipeline, staging, telemetry
from zcinfer.errors import BlockError, DeviceLost
from zcinfer.predictor import Predictor

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture(autouse=True)
def _all_blocks_flow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU too; in chunks so small that slots are used again and again."""
    monkeypatch.setattr(pipeline, "suits", lambda device: True)
    monkeypatch.setattr(pipeline, "LEAST", 256)
    monkeypatch.setattr(pipeline, "PARTS", 10)
    yield
    lanes.lanes.clear()


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each chunk that was sent."""
    found: list[int] = []
    send = pipeline.Pipeline._send

    def counted(self: Any, lane: Any, slot: Any, pieces: Any) -> None:
        found.append(sum(map(len, pieces)))
        send(self, lane, slot, pieces)

    monkeypatch.setattr(pipeline.Pipeline, "_send", counted)
    return found


def normal(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def plainly(model: Callable[..., torch.Tensor], x: Array, batch: int) -> Array:
    with torch.inference_mode():
        return np.concatenate([model(part).numpy() for part in torch.split(torch.from_numpy(x), batch)])


@pytest.mark.parametrize(("rows", "batch"), [(1, 4), (4, 4), (5, 4), (103, 1), (103, 4), (103, 200), (997, 16)])
def test_batches_equal_the_plain_loop(rows: int, batch: int, chunks: list[int]) -> None:
    zc.put(mlp(), "mlp")
    x = normal(rows, 8)
    assert np.array_equal(zc.predict("mlp", x, batch_size=batch), plainly(mlp(), x, batch))
    assert sum(chunks) == rows
    assert all(chunk % batch == 0 for chunk in chunks[:-1])
    if rows == 997:
        assert len(chunks) > 2 * lanes.SLOTS


def test_large_batches_take_fewer_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MOST", 256)
    zc.put(mlp(), "mlp")
    x = normal(200, 8)
    assert np.array_equal(zc.predict("mlp", x, batch_size=16), plainly(mlp(), x, 16))
    (lane,) = lanes.lanes._free[torch.device("cpu")]
    assert [len(slot.rows.host) > 0 for slot in lane.slots] == [True, True, False]


def test_lazy_blocks_equal_the_plain_loop() -> None:
    zc.put(mlp(), "mlp")
    x = normal(200, 8)
    lazy = zc.predict("mlp", da.from_array(x, chunks=(50, 8)), batch_size=7)
    expected = np.concatenate([plainly(mlp(), x[i : i + 50], 7) for i in range(0, 200, 50)])
    assert np.array_equal(lazy.compute(scheduler="threads"), expected)


class Cast(nn.Module):
    """Gives what it gets, in the dtype of its own."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pytest.mark.parametrize("layout", ["c", "fortran", "strided", "reversed", "big-endian", "read-only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_layout_and_dtype(layout: str, dtype: torch.dtype) -> None:
    zc.put(Cast(dtype).eval(), "cast")
    x = normal(70, 3)
    given: Array = {
        "c": x,
        "fortran": np.asfortranarray(x),
        "strided": np.repeat(x, 2, axis=0)[::2],
        "reversed": x[::-1].copy()[::-1],
        "big-endian": x.astype(">f8"),
        "read-only": x,
    }[layout]
    given.flags.writeable = layout != "read-only"
    expected = torch.from_numpy(x.copy()).to(dtype)
    found = zc.predict("cast", given, batch_size=4)
    assert found.dtype == ("f4" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))
    assert np.array_equal(found, expected.float().numpy() if dtype == torch.bfloat16 else expected.numpy())


@pytest.mark.parametrize("dtype", ["?", "u1", "i4", "i8", "u2", "c8"])
def test_what_is_not_floating_stays_what_it_is(dtype: str) -> None:
    class Same(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    zc.put(Same().eval(), "same")
    x = np.arange(90).reshape(30, 3).astype(dtype)
    found = zc.predict("same", x, batch_size=4)
    assert found.dtype == ("i8" if dtype == "u2" else dtype)
    assert np.array_equal(found, x)


def test_large_rows_are_copied_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "WORTH", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    used: list[int] = []
    copy = staging._copy
    monkeypatch.setattr(
        staging, "_copy", lambda target, array, cast: (used.append(len(array)), copy(target, array, cast))
    )
    zc.put(mlp(), "mlp")
    x = normal(1000, 8)
    monkeypatch.setattr(pipeline, "LEAST", 1 << 20)
    assert np.array_equal(zc.predict("mlp", x, batch_size=100), plainly(mlp(), x, 100))
    assert sorted(used) == [333, 333, 334]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 4)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embedding(ids) * attention_mask[..., None]
        return {"hidden": hidden, "pooled": hidden.sum(1), "length": attention_mask.sum(1)}


@pytest.mark.parametrize("output", ["hidden", "pooled", ["hidden", "length", "pooled"]])
def test_tokens_sorted_by_length(output: Any) -> None:
    zc.put(Tokens().eval(), "tokens")
    lengths = np.random.default_rng(1).integers(1, 12, 60)
    mask = (np.arange(12) < lengths[:, None]).astype(np.int64)
    ids = np.random.default_rng(2).integers(0, 50, (60, 12)) * mask
    found = zc.predict("tokens", ids=ids, attention_mask=mask, output=output, batch_size=7, sort_by="length")
    with torch.inference_mode():
        expected = Tokens().eval()(torch.from_numpy(ids), torch.from_numpy(mask))
    names, arrays = ([output], [found]) if isinstance(output, str) else (output, found)
    for name, array in zip(names, arrays, strict=True):
        assert np.allclose(array, expected[name].numpy(), atol=1e-6)
        assert array.dtype == expected[name].numpy().dtype


def test_functions_before_and_after_get_each_batch() -> None:
    zc.put(mlp(), "mlp")
    x, seen = normal(45, 4), []

    def before(rows: Array) -> Array:
        return np.concatenate([rows, -rows], axis=1)

    def after(y: Array) -> tuple[Array, Array]:
        seen.append(y)
        return y.argmax(1), y.max(1)

    predictor = Predictor("mlp", batch_size=8, preprocess=before, postprocess=after, dtype="float16")
    best, most = predictor(x)
    expected = plainly(mlp(), before(x), 8)
    assert np.array_equal(best, expected.argmax(1))
    assert np.array_equal(most, expected.max(1).astype("f2"))
    kept = np.concatenate(seen[-6:])  # and what it keeps stays what it was
    assert np.array_equal(kept, expected)


@pytest.mark.parametrize("rows", [1, 9])
def test_row_axis_squeezed_away_is_put_back(rows: int) -> None:
    class Squeezed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(1).squeeze()

    zc.put(Squeezed().eval(), "squeezed")
    x = normal(rows, 8)
    assert np.allclose(zc.predict("squeezed", x, batch_size=4), x.sum(1), atol=1e-5)


class Failing(nn.Module):
    """Fails at the rows that begin with ``bad``."""

    def __init__(self, error: Exception, bad: float = 77.0):
        super().__init__()
        self.layer, self.error, self.bad = nn.Linear(2, 2), error, bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x[:, 0] == self.bad).any():
            raise self.error
        output: torch.Tensor = self.layer(x)
        return output


def failing(error: Exception, rows: int = 100, bad: int = 42) -> Array:
    zc.put(Failing(error).eval(), "failing")
    x = normal(rows, 2)
    x[bad, 0] = 77
    return x


def test_a_failing_batch_is_named_by_its_rows() -> None:
    x = failing(ValueError("no"))
    with pytest.raises(BlockError, match=r"rows 40–44, of failing@1: .*ValueError: no"):
        zc.predict("failing", x, batch_size=5)


def test_rows_that_cannot_be_cast_are_named() -> None:
    zc.put(nn.Embedding(4, 2).eval(), "ids")
    x = np.zeros((20, 1), np.uint64)
    x[13] = 1 << 63
    with pytest.raises(BlockError, match=r"rows 0–19, of ids@1: .*do not fit into int64"):
        zc.predict("ids", x, batch_size=5)


def test_functions_that_fail_name_their_batch() -> None:
    zc.put(mlp(), "mlp")
    x = normal(50, 8)
    x[23] = 5

    def fail(rows: Array) -> Array:
        if (rows == 5).all(axis=1).any():
            raise ValueError("five")
        return rows

    with pytest.raises(BlockError, match=r"rows 20–29, of mlp@1: .*five"):
        zc.predict("mlp", x, batch_size=10, preprocess=fail)
    bad = plainly(mlp(), x, 10)[23]

    def fail_after(rows: Array) -> Array:
        if (rows == bad).all(axis=1).any():
            raise ValueError("bad")
        return rows

    with pytest.raises(BlockError, match=r"rows 20–29, of mlp@1: .*bad"):
        zc.predict("mlp", x, batch_size=10, postprocess=fail_after)


def test_an_output_of_another_shape_is_not_broadcast() -> None:
    class Short(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if type(x) is not torch.Tensor or (x[:, 0] < 77).all() else x[:1]

    zc.put(Short().eval(), "short")
    x = normal(20, 2)
    assert np.array_equal(zc.predict("short", x, batch_size=5), x)
    x[12, 0] = 77
    with pytest.raises(BlockError, match=r"rows 10–14, of short@1: .*shape \(1, 2\), expected \(5, \.\.\.\)"):
        zc.predict("short", x, batch_size=5)


class Greedy(nn.Module):
    """Has room for four rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor and len(x) > 4:
            raise torch.OutOfMemoryError("out of memory")
        output: torch.Tensor = self.layer(x)
        return output


def test_a_batch_that_does_not_fit_is_halved(caplog: pytest.LogCaptureFixture) -> None:
    model = Greedy().eval()
    zc.put(model, "greedy")
    x = normal(64, 2)
    job = telemetry.Job("halved", "halved")
    predictor = Predictor("greedy", batch_size=16)
    predictor.job = job
    found = predictor(x)
    assert np.allclose(found, plainly(model, x, 4), atol=1e-6)
    assert [r.getMessage().partition(": ")[2] for r in caplog.records if "halves" in r.getMessage()] == [
        "16 rows do not fit into memory, halves of them are tried",
        "8 rows do not fit into memory, halves of them are tried",
    ]


def test_halves_get_the_rows_and_not_what_the_model_wrote_to_them() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.mul_(2)
            if type(x) is torch.Tensor and len(x) > 4:
                raise torch.OutOfMemoryError("out of memory")
            return y + 1

    zc.put(Writes().eval(), "writes")
    x = normal(61, 3)
    assert np.array_equal(zc.predict("writes", x, batch_size=16), x * 2 + 1)


def test_a_row_that_does_not_fit_is_told() -> None:
    x = failing(torch.OutOfMemoryError("too large"))
    with pytest.raises(BlockError, match=r"rows 40–44, of failing@1: .*one row \(8 B\) does not fit into the memory"):
        zc.predict("failing", x, batch_size=5)


@pytest.mark.parametrize("way", ["preprocess", "postprocess"])
def test_functions_that_run_out_of_memory_get_halves(way: str) -> None:
    zc.put(nn.Linear(3, 2).eval(), "linear")
    x = normal(61, 3)
    sizes: list[int] = []

    def greedy(rows: Array) -> Array:
        if len(rows) > 4:
            raise MemoryError("there is room for four")
        sizes.append(len(rows))
        return rows

    found = zc.predict("linear", x, batch_size=16, **{way: greedy})
    assert max(sizes) == 4
    assert np.allclose(found, zc.predict("linear", x, batch_size=16), atol=1e-6)


def late(code: int) -> torch.AcceleratorError:
    error = torch.AcceleratorError("CUDA error: something happened before")
    error.error_code = code
    return error


def strike(monkeypatch: pytest.MonkeyPatch, error: Exception, after: int) -> None:
    """Have the device tell of an error when the host waits for it, so many chunks later."""
    take, count = pipeline.Pipeline._take, [0]

    def struck(self: Any, *arguments: Any) -> None:
        count[0] += 1
        if count[0] == after:
            raise error
        take(self, *arguments)

    monkeypatch.setattr(pipeline.Pipeline, "_take", struck)


@pytest.mark.parametrize(("code", "said"), [(700, r"\(CUDA error 700"), (0, "something happened before")])
def test_an_error_that_comes_late_is_blamed_on_no_rows(monkeypatch: pytest.MonkeyPatch, code: int, said: str) -> None:
    zc.put(mlp(), "mlp")
    strike(monkeypatch, late(code), 2)
    with pytest.raises(BlockError, match=rf"the rows given, of mlp@1, in some of its rows: .*{said}") as caught:
        zc.predict("mlp", normal(500, 8), batch_size=5)
    assert isinstance(caught.value, DeviceLost) == (code == 700)
    assert "rows 0" not in str(caught.value)


def test_where_the_device_lives_the_block_is_done_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    zc.put(mlp(), "mlp")
    x = normal(500, 8)
    strike(monkeypatch, late(1), 2)
    assert np.array_equal(zc.predict("mlp", x, batch_size=5), plainly(mlp(), x, 5))
    assert "It is done again, batch by batch" in caplog.text


def test_and_then_the_rows_that_fail_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x = failing(late(1), rows=500, bad=321)
    with pytest.raises(BlockError, match=r"rows 320–324, of failing@1: .*something happened"):
        zc.predict("failing", x, batch_size=5)


def test_no_memory_for_a_chunk_is_no_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(self: Any, nbytes: int) -> None:
        raise late(2)  # as pinned memory that there is not

    monkeypatch.setattr(lanes.Buffer, "reserve", full)
    zc.put(mlp(), "mlp")
    x = normal(50, 8)
    assert np.array_equal(zc.predict("mlp", x, batch_size=5), plainly(mlp(), x, 5))
    assert "It is done again, batch by batch" in caplog.text


def test_bad_rows_are_found_in_blocks_that_flow(tmp_path: Any) -> None:
    import zarr

    x = failing(ValueError("no"), rows=60, bad=42)
    zarr.save_array(str(tmp_path / "x.zarr"), x)
    report = zc.run("failing", x_path := str(tmp_path / "x.zarr"), tmp_path / "y.zarr", on_error="nan", progress=False)
    found = zarr.open_array(str(tmp_path / "y.zarr"))[:]
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [42], (report, x_path)


def test_lanes_are_made_once_and_not_used_after_a_failure() -> None:
    zc.put(mlp(), "mlp")
    x = failing(ValueError("no"))
    device = torch.device("cpu")
    for _ in range(3):
        zc.predict("mlp", normal(50, 8), batch_size=5)
    (lane,) = lanes.lanes._free[device]
    with pytest.raises(BlockError):
        zc.predict("failing", x, batch_size=5)
    assert lanes.lanes._free[device] == []
    zc.predict("mlp", normal(50, 8), batch_size=5)
    assert lanes.lanes._free[device] != [lane]


def test_the_memory_of_a_block_that_is_done_again_is_given_back_before(monkeypatch: pytest.MonkeyPatch) -> None:
    zc.put(mlp(), "mlp")
    made: list[weakref.ref[lanes.Slot]] = []
    make = lanes.Slot.__init__

    def noted(self: Any, device: torch.device) -> None:
        made.append(weakref.ref(self))
        make(self, device)

    def struck(self: Any, *arguments: Any) -> None:
        raise late(1)

    monkeypatch.setattr(lanes.Slot, "__init__", noted)
    monkeypatch.setattr(pipeline.Pipeline, "_take", struck)
    gc.disable()  # memory of a device does not have Python look for circles
    try:
        zc.predict("mlp", normal(500, 8), batch_size=5)
        assert [slot() for slot in made] == [None] * lanes.SLOTS
    finally:
        gc.enable()


def test_also_no_bytes_are_on_the_device() -> None:
    buffer = lanes.Buffer(torch.device("meta"))
    buffer.reserve(0)
    assert buffer.there.device.type == "meta"


def test_time_and_batches_are_counted() -> None:
    zc.put(mlp(), "mlp")
    predictor = Predictor("mlp", batch_size=5)
    predictor.job = telemetry.Job("flowing", "flowing")
    predictor(normal(103, 8))
    (work,) = [one for one in telemetry.snapshot()["work"] if one["job"] == "flowing"]
    assert (work["rows"], work["batches"], work["errors"]) == (103, 21, 0)
    seconds = dict(zip(telemetry.PHASES, work["seconds"], strict=True))
    assert all(seconds[phase] > 0 for phase in ("to_device", "computing", "from_device"))


# What a card may do in another order than the program says


def flow(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[], None] = lambda: None) -> Recorder:
    """A block over streams that remember, and what they saw of the slots."""
    recorder = Recorder()
    monkeypatch.setattr(lanes, "streams_of", lambda device: recorder)
    reserve, stage, take = lanes.Buffer.reserve, pipeline.stage, pipeline.Pipeline._take

    def watched(self: Any, nbytes: int) -> None:
        # Memory of the device is apart from that of the host, as on a card.
        reserve(self, nbytes)
        recorder.watch(self.host)
        recorder.watch(self.there)

    def staged(buffer: Any, piece: Any, casts: Any) -> None:
        recorder.access(buffer.host, True, "staging", host=True)
        stage(buffer, piece, casts)

    def taken(self: Any, slot: Any, pieces: Any, *others: Any) -> None:
        take(self, slot, pieces, *others)
        recorder.access(slot.results.host, False, "taking", host=True)

    monkeypatch.setattr(lanes.Buffer, "reserve", watched)
    monkeypatch.setattr(pipeline, "stage", staged)
    monkeypatch.setattr(pipeline.Pipeline, "_take", taken)
    spoil()
    zc.put(mlp(), "mlp")
    x = normal(1000, 8)
    with recorder:
        found = zc.predict("mlp", x, batch_size=16)
    assert np.array_equal(found, plainly(mlp(), x, 16))
    return recorder


def test_streams_and_host_never_race(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = flow(monkeypatch)
    assert recorder.races == []
    assert len(recorder.used) == 4  # the host and three streams


@pytest.mark.parametrize(
    ("event", "race"),
    [("arrived", "copy_"), ("computed", "copy_"), ("returned", "taking")],
)
def test_each_event_is_needed(monkeypatch: pytest.MonkeyPatch, event: str, race: str) -> None:
    def spoil() -> None:
        made = lanes.Slot.__init__

        def without(self: Any, device: torch.device) -> None:
            made(self, device)
            setattr(self, event, type(getattr(self, event))())
            getattr(self, event).record = lambda stream: None

        monkeypatch.setattr(lanes.Slot, "__init__", without)

    recorder = flow(monkeypatch, spoil)
    assert any(race in one for one in recorder.races)
