"""Mappings: what one reader writes nobody else sees, and nothing is left of them.

Ray's own pages are in test_store; here an anonymous shared mapping stands for them.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zcinfer import sharing
from zcinfer.sharing import Plasma, copy_mapped, map_file, written_pages

PAGE = mmap.PAGESIZE

if sys.platform != "linux":
    pytest.skip("/proc is Linux's", allow_module_level=True)


class Owner:
    """Something that can be seen to go."""


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).integers(0, 256, 5 * PAGE + 123, np.uint8).tobytes()


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "file"
    path.write_bytes(content)
    return path


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


def mappings_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 7])
@pytest.mark.parametrize("nbytes", [1, PAGE, 2 * PAGE + 100])
def test_any_part_of_a_file_can_be_mapped(offset: int, nbytes: int, path: Path, content: bytes) -> None:
    array = map_file(path, offset, nbytes)
    assert array.dtype == np.uint8
    assert array.tobytes() == content[offset : offset + nbytes]


@pytest.mark.parametrize("offset", [0, PAGE, 5 * PAGE + 123, 100 * PAGE])
def test_no_bytes_are_an_empty_array(offset: int, path: Path) -> None:
    assert map_file(path, offset, 0).shape == (0,)


def test_writes_reach_neither_the_file_nor_other_mappings(path: Path, content: bytes) -> None:
    writer, other = (map_file(path, 100, 3 * PAGE) for _ in range(2))
    writer[:] = 0
    later = map_file(path, 100, 3 * PAGE)
    assert not writer.any()
    assert path.read_bytes() == content
    assert other.tobytes() == later.tobytes() == content[100 : 100 + 3 * PAGE]


def test_torch_takes_a_mapping_as_writable(path: Path, content: bytes, recwarn: pytest.WarningsRecorder) -> None:
    tensor = torch.frombuffer(map_file(path, 8, PAGE), dtype=torch.uint8)
    tensor.zero_()
    assert path.read_bytes() == content
    assert not recwarn.list


def test_a_mapping_outlives_its_file(path: Path, content: bytes) -> None:
    array = map_file(path, 0, PAGE)
    path.unlink()
    assert array.tobytes() == content[:PAGE]


@pytest.mark.parametrize("derive", [lambda a: a, lambda a: a[5:9].view(np.uint16), torch.from_numpy])
def test_an_owner_lives_exactly_as_long_as_any_view(derive: Any, path: Path) -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    array = map_file(path, 10, PAGE, owner=owner)
    view = derive(array)
    del owner, array
    assert gone() is not None
    assert mappings_of(path) == 1
    del view
    assert gone() is None
    assert mappings_of(path) == 0


def test_a_thousand_mappings_leave_nothing(path: Path) -> None:
    before = descriptors()
    for number in range(1000):
        array = map_file(path, number, PAGE, owner=Owner())
        array[0] ^= 1
        del array
    assert descriptors() == before
    assert mappings_of(path) == 0


@pytest.mark.parametrize("nbytes", [6 * PAGE, 1 << 40, 1 << 62])
def test_more_than_the_file_has_is_refused_and_leaves_nothing(nbytes: int, path: Path) -> None:
    before = descriptors()
    with pytest.raises((ValueError, OSError, OverflowError)):
        map_file(path, 0, nbytes)
    assert descriptors() == before
    assert mappings_of(path) == 0


# --- another process's open file, as a raylet's ---------------------------------------------------------------------

RAYLET = """
import ctypes, sys
file = open(sys.argv[1])
ctypes.CDLL(None).prctl(15, b"raylet", 0, 0, 0)  # PR_SET_NAME
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def plasma() -> Iterator[tuple[np.ndarray[Any, Any], int]]:
    """An array in a shared mapping of a file that is unlinked but open in a process named raylet, and its id."""
    descriptor, name = tempfile.mkstemp(dir="/dev/shm")
    os.write(descriptor, bytes(range(256)) * (4 * PAGE // 256))
    with subprocess.Popen(
        [sys.executable, "-c", RAYLET, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        os.unlink(name)
        mapping = mmap.mmap(descriptor, 4 * PAGE)
        os.close(descriptor)
        assert ready == b"open\n"
        yield np.frombuffer(mapping, np.uint8), process.pid
        process.communicate()


def test_a_raylets_pages_are_mapped_again(plasma: tuple[np.ndarray[Any, Any], int]) -> None:
    array, pid = plasma
    buffer, protection = Plasma(array).map(PAGE + 5, 2 * PAGE)
    assert protection == "copy-on-write"
    assert Plasma(array).raylet() == pid
    assert np.array_equal(buffer, array[PAGE + 5 : 3 * PAGE + 5])
    before = array.tobytes()
    buffer[:] = 0
    assert array.tobytes() == before


def test_a_second_mapping_keeps_rays_array(plasma: tuple[np.ndarray[Any, Any], int]) -> None:
    array, _ = plasma
    mine = array[:]
    gone = weakref.ref(mine)
    buffer, _ = Plasma(mine).map(PAGE, PAGE)
    tensor = torch.from_numpy(buffer)
    del mine, buffer
    assert gone() is not None
    del tensor
    assert gone() is None


def test_copies_stay_what_they_are(plasma: tuple[np.ndarray[Any, Any], int]) -> None:
    array, _ = plasma
    buffer, _ = Plasma(array).map(PAGE + 5, 2 * PAGE)
    tensor = torch.from_numpy(buffer)[7:]
    tensor[0] = 77
    before, mappings = buffer.tobytes(), len(Path("/proc/self/maps").read_text().splitlines())
    copy_mapped()
    array[:] = 0
    assert buffer.tobytes() == before
    tensor.zero_()
    assert not array.any()
    del tensor, buffer
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= mappings


def mapped_at(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        spans = [[int(part, 16) for part in line.split()[0].split("-")] for line in maps]
    return any(start <= address < end for start, end in spans)


def test_a_mapping_that_was_only_read_serves_again(plasma: tuple[np.ndarray[Any, Any], int]) -> None:
    array, _ = plasma
    mine = Plasma(array)
    buffer, _ = mine.map(PAGE, 2 * PAGE)
    expected, address = buffer.tobytes(), buffer.ctypes.data
    del buffer
    again, _ = mine.map(PAGE, 2 * PAGE)
    assert again.ctypes.data == address
    assert again.tobytes() == expected
    other, _ = mine.map(PAGE, 2 * PAGE)  # that one is in use
    assert other.ctypes.data != address
    del again, other, mine
    assert not mapped_at(address)


def test_a_mapping_that_was_written_to_does_not_serve_again(plasma: tuple[np.ndarray[Any, Any], int]) -> None:
    array, _ = plasma
    mine = Plasma(array)
    buffer, _ = mine.map(PAGE, 2 * PAGE)
    expected = buffer.tobytes()
    buffer[PAGE + 7] += 1
    del buffer
    again, _ = mine.map(PAGE, 2 * PAGE)
    assert again.tobytes() == expected


def test_a_part_is_not_taken_for_another(plasma: tuple[np.ndarray[Any, Any], int]) -> None:
    array, _ = plasma
    mine = Plasma(array)
    expected = array[2 * PAGE : 3 * PAGE].tobytes()
    mine.map(PAGE, PAGE)  # and dropped
    assert mine.map(2 * PAGE, PAGE)[0].tobytes() == expected


@pytest.mark.parametrize("scan", [True, False])
def test_written_pages_are_counted_also_where_the_kernel_cannot_scan(
    scan: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not scan:

        def refused(*_: Any) -> int:
            raise OSError(errno.ENOTTY, "")

        monkeypatch.setattr(sharing, "_scan", refused)
    (tmp_path / "pages").write_bytes(bytes(range(256)) * 16 * 3000)
    buffer = map_file(tmp_path / "pages", 0, 3000 * PAGE)
    buffer.sum()
    assert written_pages(buffer) == 0
    buffer[5 * PAGE] = 1
    buffer[100 * PAGE : 2900 * PAGE : 2 * PAGE] = 1  # more regions than are asked for at a time
    assert written_pages(buffer) == 1401


def test_a_raylet_that_hides_its_files_is_asked_once(
    plasma: tuple[np.ndarray[Any, Any], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def listdir(path: str) -> list[str]:
        asked.append(path)
        raise PermissionError

    asked: list[str] = []
    array, pid = plasma
    monkeypatch.setattr(os, "listdir", listdir)
    assert [Plasma(array).map(PAGE, PAGE)[1] for _ in range(3)] == ["read-only"] * 3
    assert asked.count(f"/proc/{pid}/fd") == 1


def test_a_raylet_that_has_died_is_not_asked(plasma: tuple[np.ndarray[Any, Any], int]) -> None:
    array, pid = plasma
    before = array.tobytes()
    assert Plasma(array).map(PAGE, PAGE)[1] == "copy-on-write"
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    buffer, protection = Plasma(array).map(PAGE, 2 * PAGE)
    assert protection == "read-only"
    assert buffer.tobytes() == before[PAGE : 3 * PAGE]
    assert Plasma(array).raylet() is None


# --- pages that cannot be mapped a second time ----------------------------------------------------------------------

READ_ONLY = """
import json, mmap, os, pickle, resource, sys
import numpy as np
from zcinfer.sharing import Plasma

PAGE = mmap.PAGESIZE
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def signal_of(function):
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.waitpid(child, 0)[1]

def as_ray_gives_it(pages):
    '''Unpickled over the pages, and so an array on top of another one.'''
    buffers = []
    head = pickle.dumps(np.frombuffer(pages, np.uint8), protocol=5, buffer_callback=buffers.append)
    return pickle.loads(head, buffers=buffers)

makers = {
    "array": lambda pages: np.frombuffer(pages, np.uint8),
    "slice": lambda pages: np.frombuffer(pages, np.uint8)[:],
    "unpickled": as_ray_gives_it,
}
pages = mmap.mmap(-1, 6 * PAGE)  # shared with the children
pages[:] = bytes(range(256)) * (6 * PAGE // 256)
before = bytes(pages)
# As an archive lies in an object: unaligned, a page in front, and a last page without value.
offset, nbytes = PAGE + 64, 4 * PAGE

def write(buffer, position):
    buffer[position] ^= 1

found = {}
for kind, make in makers.items():
    buffer, protection = Plasma(make(pages)).map(offset, nbytes)
    twin, _ = Plasma(make(pages)).map(offset, nbytes)
    inner = buffer[10:20]
    facts = found[kind] = {"protection": protection, "content": buffer.tobytes() == before[offset : offset + nbytes]}
    facts["writes"] = [
        signal_of(lambda: write(buffer, 0)),
        signal_of(lambda: write(buffer, PAGE)),
        signal_of(lambda: write(buffer, nbytes - PAGE)),
        signal_of(lambda: pages.__setitem__(offset, 1)),
    ]
    del buffer
    facts["write through a view that is left"] = signal_of(lambda: write(inner, 0))
    facts["unchanged"] = bytes(pages) == before
    del inner
    facts["write while another array lies on the pages"] = signal_of(lambda: write(twin, 0))
    facts["write to the next object"] = signal_of(lambda: pages.__setitem__(6 * PAGE - 1, before[-1]))
    del twin
    facts["write after release"] = signal_of(lambda: pages.__setitem__(offset, before[offset]))

class Pinned:
    '''What Ray's buffer is: told when nobody holds it any more.'''

    def __init__(self):
        self.__array_interface__ = np.frombuffer(pages, np.uint8).__array_interface__

    def __del__(self):
        found["write at release"] = signal_of(lambda: pages.__setitem__(offset, before[offset]))

Plasma(np.asarray(Pinned())).map(offset, nbytes)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def read_only() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", READ_ONLY], stdout=subprocess.PIPE, timeout=60, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", ["array", "slice", "unpickled"])
class TestReadOnly:
    def test_it_is_said(self, kind: str, read_only: dict[str, Any]) -> None:
        assert read_only[kind]["protection"] == "read-only"

    def test_the_content_is_there(self, kind: str, read_only: dict[str, Any]) -> None:
        assert read_only[kind]["content"]

    def test_a_write_ends_the_process(self, kind: str, read_only: dict[str, Any]) -> None:
        assert read_only[kind]["writes"] == [11] * 4

    def test_a_write_through_any_view_ends_the_process(self, kind: str, read_only: dict[str, Any]) -> None:
        assert read_only[kind]["write through a view that is left"] == 11

    def test_a_write_ends_the_process_as_long_as_one_of_several_arrays_lies_there(
        self, kind: str, read_only: dict[str, Any]
    ) -> None:
        assert read_only[kind]["write while another array lies on the pages"] == 11

    def test_no_byte_has_changed(self, kind: str, read_only: dict[str, Any]) -> None:
        assert read_only[kind]["unchanged"]

    def test_the_next_object_can_be_written(self, kind: str, read_only: dict[str, Any]) -> None:
        assert read_only[kind]["write to the next object"] == 0

    def test_pages_are_writable_again_after_release(self, kind: str, read_only: dict[str, Any]) -> None:
        assert read_only[kind]["write after release"] == 0


def test_pages_are_writable_before_they_are_released(read_only: dict[str, Any]) -> None:
    assert read_only["write at release"] == 0
