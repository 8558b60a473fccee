"""Sources: each kind gives its rows, on workers too; a changed one is another one; what cannot be read says why."""

from __future__ import annotations

import functools
import logging
import mmap
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dask.array as da
import fsspec
import h5py
import numpy as np
import pytest
import torch
import zarr
from torch import nn
from zarr.storage import FsspecStore, MemoryStore

import zcinfer as zc
from zcinfer.errors import InputError, OutputError
from zcinfer.jobreport import Report
from zcinfer.readers import Hdf5Reader, NpyReader, Reader, ZarrReader
from zcinfer.sources import directory_of, open_source
from zcinfer.stamps import remote_stamp

pytestmark = pytest.mark.usefixtures("registry")

X = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)
CHUNKS = (5, 4)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).eval()


def by_hand(x: np.ndarray = X) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = linear()(torch.from_numpy(np.ascontiguousarray(x, np.float32))).numpy()
    return found


def run(source: Any, target: Path, **settings: Any) -> Report:
    return zc.run("model", source, target, progress=False, **settings)


def agrees(target: Path, x: np.ndarray = X) -> bool:
    found: Any = zarr.open_array(str(target), mode="r")[...]
    return np.allclose(found, by_hand(x), rtol=0, atol=1e-6)


# Kinds of sources: how each is made, what is given, and how one of its values is changed


@dataclass
class Kind:
    given: Any
    change: Callable[[], object]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory and the URL that a web server on this machine gives it."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 100  # more wait a second, the kernel's

    directory = tmp_path / "web"
    directory.mkdir()
    with Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(directory))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield directory, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of a directory of fsspec's file system in memory."""
    yield "memory://zcinfer-tests"
    fsspec.filesystem("memory").rm("/zcinfer-tests", recursive=True)


def save(place: Any, x: np.ndarray = X, **options: Any) -> Any:
    array = zarr.create_array(place, shape=x.shape, dtype=x.dtype, chunks=CHUNKS, **options)
    array[...] = x
    return array


def change_zarr(place: Any) -> None:
    zarr.open_array(place, mode="r+")[7] = 0


def later(path: Path) -> None:
    """A web server tells times in whole seconds."""
    os.utime(path, (time.time() + 10,) * 2)


def in_zarr(tmp_path: Path) -> Kind:
    path = str(tmp_path / "in.zarr")
    save(path)
    return Kind(path, lambda: change_zarr(path))


def in_zarr_of_shards(tmp_path: Path) -> Kind:
    path = tmp_path / "in.zarr"
    save(path, shards=(10, 4))
    return Kind(path, lambda: change_zarr(path))


def at_a_file_url(tmp_path: Path) -> Kind:
    kind = in_zarr(tmp_path)
    return Kind(f"file://{kind.given}", kind.change)


def in_npy(tmp_path: Path) -> Kind:
    path = tmp_path / "in.npy"
    np.save(path, X)

    def change() -> None:
        np.lib.format.open_memmap(path, mode="r+")[7] = 0
        os.utime(path)  # which writing through a map does some time later

    return Kind(path, change)


def in_hdf5(tmp_path: Path) -> Kind:
    path = tmp_path / "in.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("group/x", data=X, chunks=(3, 2), compression="gzip")

    def change() -> None:
        with h5py.File(path, "r+") as file:
            file["group/x"][7] = 0

    return Kind(f"{path}::/group/x", change)


def in_memory(url: str) -> Kind:
    save(f"{url}/in.zarr")
    return Kind(f"{url}/in.zarr", lambda: change_zarr(f"{url}/in.zarr"))


def in_a_group_in_memory(url: str) -> Kind:
    group = zarr.open_group(f"{url}/group.zarr", mode="w")
    group.create_array("x", shape=X.shape, dtype=X.dtype, chunks=CHUNKS)[...] = X
    return Kind(f"{url}/group.zarr/x", lambda: change_zarr(f"{url}/group.zarr/x"))


def opened_by_the_user(url: str) -> Kind:
    kind = in_memory(url)
    return Kind(zarr.open_array(FsspecStore.from_url(kind.given, read_only=True), mode="r"), kind.change)


def on_the_web(web: tuple[Path, str], **options: Any) -> Kind:
    directory, url = web
    save(directory / "in.zarr", **options)

    def change() -> None:
        change_zarr(directory / "in.zarr")
        later(directory / "in.zarr" / ("c/1/0" if not options else "1.0"))

    return Kind(f"{url}/in.zarr", change)


KINDS = {
    "zarr": in_zarr,
    "shards": in_zarr_of_shards,
    "file URL": at_a_file_url,
    "npy": in_npy,
    "HDF5": in_hdf5,
    "memory": in_memory,
    "group": in_a_group_in_memory,
    "opened": opened_by_the_user,
    "web": on_the_web,
    "web, zarr v2": functools.partial(on_the_web, zarr_format=2),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    make = KINDS[request.param]
    if request.param.startswith("web"):
        return make(request.getfixturevalue("web"))
    if request.param in ("memory", "group", "opened"):
        return make(request.getfixturevalue("memory"))
    return make(tmp_path)


def test_rows_of_each_kind(tmp_path: Path, kind: Kind) -> None:
    zc.put(linear(), "model")
    run(kind.given, tmp_path / "out.zarr")
    assert agrees(tmp_path / "out.zarr")


@pytest.mark.parametrize("complete", [True, False])
def test_same_input_goes_on_and_a_changed_one_is_refused(tmp_path: Path, kind: Kind, complete: bool) -> None:
    zc.put(linear(), "model")
    out = tmp_path / "out.zarr"
    run(kind.given, out)
    assert run(kind.given, out).computed == 0
    place = out
    if not complete:
        (out / ".zcinfer" / "done").mkdir()
        place = out.rename(tmp_path / "out.zarr.partial")
    kind.change()
    with pytest.raises(OutputError, match=r"output of another job \(it differs in [^)]*modified"):
        run(kind.given, out)
    assert agrees(place)  # untouched
    run(kind.given, out, resume=False)
    changed = X.copy()
    changed[7] = 0
    assert agrees(out, changed)


@pytest.mark.parametrize("given", [lambda: da.from_array(X, chunks=CHUNKS), lambda: save(MemoryStore())])
def test_what_tells_nothing_of_its_content_is_never_the_same(tmp_path: Path, given: Callable[[], Any]) -> None:
    zc.put(linear(), "model")
    source = given()
    run(source, tmp_path / "out.zarr")
    assert agrees(tmp_path / "out.zarr")
    with pytest.raises(OutputError, match="differs in content"):
        run(source, tmp_path / "out.zarr")


def test_stamp_of_the_web_asks_for_some_chunks_of_many(web: tuple[Path, str]) -> None:
    directory, url = web
    zarr.create_array(directory / "in.zarr", shape=(1000, 2), chunks=(1, 1), dtype="i1", fill_value=0)[::2] = 1
    array = zarr.open_array(f"{url}/in.zarr", mode="r")
    before = remote_stamp(array)
    assert remote_stamp(array) == before
    for chunk in (directory / "in.zarr" / "c").rglob("?*/*"):
        later(chunk)
    assert remote_stamp(array) == before | {"modified": remote_stamp(array)["modified"]}
    assert remote_stamp(array) != before


def test_file_system_that_tells_no_times_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(zarr.storage.ZipStore(tmp_path / "in.zip", mode="w"))
    array = zarr.open_array(FsspecStore.from_url(f"zip://::{tmp_path}/in.zip", read_only=True), mode="r")
    with caplog.at_level(logging.WARNING, "zcinfer"):
        assert remote_stamp(array) == remote_stamp(array)
    assert "a restart will not notice" in caplog.text


def test_listings_are_asked_for_anew(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    array = zarr.open_array(in_memory(memory).given, mode="r")
    asked: list[object] = []
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "invalidate_cache", lambda self, *_: asked.append(self))
    remote_stamp(array)
    assert asked == [array.store.fs.sync_fs]  # type: ignore[attr-defined]


def test_password_in_a_url_is_not_kept(web: tuple[Path, str]) -> None:
    kind = on_the_web(web)
    found = open_source(kind.given.replace("//", "//me:secret@"), "input").stamp()
    assert found["url"] == kind.given


# How blocks are cut


def test_block_rows_of_what_has_no_chunks(tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.zeros((50_000, 200), np.float32))
    with h5py.File(tmp_path / "long.h5", "w") as file:
        file.create_dataset("x", shape=(50_000, 200), dtype="f4", chunks=(1000, 20))
        file.create_dataset("tall", shape=(50_000, 200), dtype="f4", chunks=(40_000, 1))
    for given, expected in (("long.npy", 10_485), ("long.h5::/x", 10_000), ("long.h5::tall", 40_000)):
        source = open_source(str(tmp_path / given), "input")
        assert source.array.chunks[0][0] == expected
        assert len(source.array.chunks[1]) == 1
    blocks = open_source(tmp_path / "long.npy", "input").in_blocks(7)
    assert blocks.chunks[0][:2] == (7, 7)
    assert len(blocks.dask) == blocks.npartitions + 1  # each read by itself


def test_blocks_are_shards_of_the_source(tmp_path: Path) -> None:
    zc.put(linear(), "model")
    assert run(in_zarr_of_shards(tmp_path).given, tmp_path / "out.zarr").blocks == 3


def test_later_inputs_take_the_blocks_of_the_first(tmp_path: Path) -> None:
    zc.put(nn.Bilinear(4, 4, 2).eval(), "model")
    sources = {"input1": in_zarr(tmp_path).given, "input2": in_npy(tmp_path).given}
    assert run(sources, tmp_path / "out.zarr").blocks == 5
    assert run(dict(reversed(sources.items())), tmp_path / "out2.zarr").blocks == 1


@pytest.mark.parametrize("place", ["x.npy", "x.h5::/x", "x.zarr"])
def test_windows_of_files(tmp_path: Path, place: str) -> None:
    x = np.random.default_rng(0).normal(size=(4, 600)).astype(np.float32)
    path = tmp_path / place.partition("::")[0]

    def save() -> None:
        if path.suffix == ".npy":
            np.save(path, x)
        elif path.suffix == ".h5":
            with h5py.File(path, "w") as file:
                file.create_dataset("x", data=x, chunks=(2, 70))
        else:
            zarr.create_array(path, shape=x.shape, dtype=x.dtype, chunks=(2, 70), overwrite=True)[...] = x

    save()
    zc.put(nn.Flatten().eval(), "model")
    w = zc.windows(tmp_path / place, 50, 10)
    expected = np.stack([x[:, start : start + 50].ravel() for start in range(0, 551, 10)])
    assert run(w, tmp_path / "out.zarr", block_rows=9).blocks == 7
    assert np.array_equal(zarr.load(str(tmp_path / "out.zarr")), expected)
    assert run(w, tmp_path / "out.zarr", block_rows=9).computed == 0
    x[0, 0] += 1
    save()
    with pytest.raises(OutputError, match="differs in modified"):
        run(w, tmp_path / "out.zarr", block_rows=9)


# Reading


READERS: dict[str, Callable[[Path], Reader]] = {
    "zarr": lambda path: ZarrReader(in_zarr(path).given),
    "npy": lambda path: NpyReader(str(in_npy(path).given)),
    "HDF5": lambda path: Hdf5Reader(in_hdf5(path).given),
}


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Reader:
    return READERS[request.param](tmp_path)


def test_reader_carries_no_content(reader: Reader) -> None:
    sent = pickle.dumps(reader)
    assert len(sent) < 600
    assert np.array_equal(pickle.loads(sent)[3:9], X[3:9])


def test_readers_in_many_threads(reader: Reader) -> None:
    array = da.from_array(reader, chunks=(2, 4), name=False, meta=X[:0])
    for _ in range(5):
        assert np.array_equal(array.compute(scheduler="threads", num_workers=8), X)


def test_file_that_is_gone_is_told(reader: Reader) -> None:
    path = directory_of(reader.url)
    assert path is not None
    path.rename(path.with_name("gone"))
    with pytest.raises(
        InputError, match=rf"no {reader.kind} at .* on .*all workers must see it, until the job is done"
    ):
        reader[0:2]


def test_file_that_became_another_is_told(tmp_path: Path, reader: Reader) -> None:
    path = directory_of(reader.url)
    assert path is not None
    if path.is_dir():
        save(path, X.astype("f8"), overwrite=True)
    elif path.suffix == ".npy":
        np.save(path, X.astype("f8"))
    else:
        with h5py.File(path, "w") as file:
            file["group/x"] = X.astype("f8")
    with pytest.raises(InputError, match=r"was \(23, 4\) float32 when the job began, and is \(23, 4\) float64"):
        reader[0:2]


def test_npy_is_mapped(tmp_path: Path) -> None:
    rows = NpyReader(str(in_npy(tmp_path).given))[3:9]
    base = rows
    while isinstance(base, np.ndarray):
        base = base.base
    assert (type(rows), type(base)) == (np.ndarray, mmap.mmap)
    assert not rows.flags.writeable


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f8", ">f4", "i8", "?"])
def test_layouts_of_npy_and_hdf5(tmp_path: Path, order: Any, dtype: str) -> None:
    x = np.asarray(X * 3, dtype=dtype, order=order)
    np.save(tmp_path / "x.npy", x)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = x
    zc.put(linear(), "model")
    for given in ("x.npy", "x.h5::x"):
        run(str(tmp_path / given), tmp_path / "out.zarr", resume=False)
        assert np.allclose(zarr.load(str(tmp_path / "out.zarr")), by_hand(x.astype(np.float32)), rtol=0, atol=1e-6)


# What cannot be read


def no_file(path: Path) -> str:
    return str(path / "nothing.npy")


def npy_of_objects(path: Path) -> str:
    np.save(path / "x.npy", np.array([{}]), allow_pickle=True)
    return str(path / "x.npy")


def npy_cut_short(path: Path) -> str:
    in_npy(path)
    os.truncate(path / "in.npy", 200)
    return str(path / "in.npy")


def npz(path: Path) -> str:
    np.savez(path / "x.npz", x=X)
    return str(path / "x.npz")


def one_number(path: Path) -> str:
    np.save(path / "x.npy", np.float32(3))
    return str(path / "x.npy")


def dataset_unnamed(path: Path) -> str:
    in_hdf5(path)
    (path / "in.h5").rename(path / "data.bin")
    return str(path / "data.bin")


def group_of_hdf5(path: Path) -> str:
    in_hdf5(path)
    return f"{path}/in.h5::/group"


def no_dataset(path: Path) -> str:
    in_hdf5(path)
    return f"{path}/in.h5::/nothing"


def no_hdf5(path: Path) -> str:
    (path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n and then nothing")
    return f"{path}/x.h5"


def text_of_hdf5(path: Path) -> str:
    with h5py.File(path / "x.h5", "w") as file:
        file["x"] = ["a", "b"]
    return f"{path}/x.h5::/x"


def zarr_as_hdf5(path: Path) -> str:
    (path / "group").mkdir()
    in_zarr(path / "group")
    return f"{path}/group::/in.zarr"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_file, r"input: there is no \.npy file at .*nothing\.npy .*No such file"),
        (npy_of_objects, r"there is no \.npy file at .*Python objects"),
        (npy_cut_short, r"there is no \.npy file at .*"),
        (npz, r"x\.npz holds several arrays .*np\.save one of them"),
        (one_number, r"x\.npy is a single number"),
        (dataset_unnamed, r"data\.bin is an HDF5 file; give one of its datasets: .*data\.bin::/group/x"),
        (group_of_hdf5, r"/group is a group; the file has .*in\.h5::/group/x"),
        (no_dataset, r"input: there is no HDF5 dataset at .*in\.h5::/nothing \(.*doesn't exist"),
        (no_hdf5, r"x\.h5 cannot be read as HDF5 \("),
        (text_of_hdf5, "which is not numeric"),
        (zarr_as_hdf5, r"is a directory and no HDF5 file; a zarr array in it is .*/in\.zarr"),
        (lambda path: "s3://bucket/x.npy", r"x\.npy is remote, and \.npy is read from mounted file systems"),
        (lambda path: "https://host/x.h5::/x", r"x\.h5 is remote, and HDF5 is read from mounted"),
        (lambda path: "nowhere://bucket/x.zarr", r"no zarr array at nowhere://bucket/x\.zarr \(.*[Pp]rotocol"),
        (lambda path: X, r"input is a ndarray: give a path or URL \(zarr, \.npy, FILE\.h5::/DATASET\)"),
    ],
)
def test_what_cannot_be_read_is_told_before_anything_is_started(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    zc.put(linear(), "model")
    with pytest.raises(InputError, match=message):
        run(make(tmp_path), tmp_path / "out.zarr")
    assert not list(tmp_path.glob("out.zarr*"))


def test_web_without_the_array_and_group_on_the_web(tmp_path: Path, web: tuple[Path, str]) -> None:
    zc.put(linear(), "model")
    directory, url = web
    zarr.open_group(str(directory / "group.zarr"), mode="w").create_array("x", shape=(4, 4), dtype="f4")
    with pytest.raises(InputError, match=r"there is no zarr array at http://.*/nothing\.zarr"):
        run(f"{url}/nothing.zarr", tmp_path / "out.zarr")
    with pytest.raises(
        InputError, match=r"group\.zarr is a zarr group; give one of its arrays: http://.*/group\.zarr/x"
    ):
        run(f"{url}/group.zarr", tmp_path / "out.zarr")


def test_without_h5py_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zc.put(linear(), "model")
    given = in_hdf5(tmp_path).given
    reader = Hdf5Reader(given)
    monkeypatch.setitem(sys.modules, "h5py", None)
    for attempt in (lambda: run(given, tmp_path / "out.zarr"), lambda: reader[0:2]):
        with pytest.raises(InputError, match=r"in\.h5 is an HDF5 file, and h5py .*pip install 'zcinfer\[hdf5\]'"):
            attempt()


@pytest.mark.parametrize("place", ["in.npy", "in.h5"])
def test_source_in_the_place_of_the_target_is_refused(tmp_path: Path, place: str) -> None:
    zc.put(linear(), "model")
    kind = in_npy(tmp_path) if place == "in.npy" else in_hdf5(tmp_path)
    with pytest.raises(OutputError, match=r"in the place of the target|not written by zcinfer"):
        run(kind.given, tmp_path / place, resume=False)
    assert (tmp_path / place).is_file()


# On a cluster


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("name", ["npy", "HDF5", "web", "file URL"])
def test_workers_read_for_themselves(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    zc.put(linear(), "model")
    monkeypatch.chdir(tmp_path)  # and not the workers
    given = KINDS[name](request.getfixturevalue("web") if name == "web" else tmp_path).given
    relative = {"npy": "in.npy", "HDF5": "in.h5::group/x"}
    assert run(relative.get(name, given), "out.zarr", block_rows=3).computed == 8  # type: ignore[arg-type]
    assert agrees(tmp_path / "out.zarr")


@pytest.mark.usefixtures("client", "memory")
def test_memory_of_this_process_is_not_that_of_workers(tmp_path: Path, memory: str) -> None:
    zc.put(linear(), "model")
    with pytest.raises(InputError, match=r"no zarr array at memory://.* on .*all workers must see it"):
        run(in_memory(memory).given, tmp_path / "out.zarr")
