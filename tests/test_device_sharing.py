"""Jobs that share a card's memory: who owns it, who writes it, and what happens when one of them dies.

Owners and dying jobs are real processes, over a driver library whose memory is memfds: as on a card, it is gone when
nobody has it mapped. What only a card can tell is in tests/gpu.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda import Make, owners
from processes import wait_until

from zcinfer import cuda_driver, device_sharing
from zcinfer.device_sharing import Card, Lease, private_runtime_directory
from zcinfer.errors import StoreUnavailable

MIB = 1 << 20


def filled(card: Card, key: str, value: int, nbytes: int = 4096) -> Lease:
    lease = card.lease(key, nbytes)
    assert lease.must_be_filled
    lease.memory.fill_(value)
    lease.fill()
    return lease


class Job:
    """A job in a process of its own that can be killed; it speaks what goes over the socket, without torch."""

    CODE = """
import json, socket, sys
line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
line.connect(sys.argv[1])
file = line.makefile("rw")
print(file.readline().strip(), flush=True)
for message in sys.stdin:
    file.write(message)
    file.flush()
    print(file.readline().strip(), flush=True)
"""

    def __init__(self, place: Path):
        (path,) = place.glob("*.sock")
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", self.CODE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.owner = self._answer()["owner"]

    def ask(self, **message: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        with self.process:
            pass


def test_the_second_job_reads_what_the_first_wrote(make: Make) -> None:
    first, second = make(), make()
    wrote = filled(first, "a", 7)
    reads = second.lease("a", 4096)
    assert not reads.must_be_filled
    assert reads.memory.eq(7).all()
    assert reads.memory.data_ptr() != wrote.memory.data_ptr()  # mapped again, as another process maps it
    assert (wrote.trouble(), reads.trouble()) == ("", "")


def test_another_key_is_another_memory(make: Make) -> None:
    card = make()
    one, other = filled(card, "a", 1), filled(card, "b", 2)
    assert one.memory.eq(1).all()
    assert other.memory.eq(2).all()


def test_one_key_has_one_length(make: Make) -> None:
    card = make()
    lease = filled(card, "a", 1)
    with pytest.raises(StoreUnavailable, match="it has 4,096 bytes there and 8,192 here"):
        make().lease("a", 8192)
    assert lease.trouble() == ""


def test_jobs_that_start_at_once_find_one_owner_and_one_writer(make: Make, place: Path) -> None:
    cards = [make() for _ in range(8)]
    together = threading.Barrier(len(cards))

    def lease(card: Card) -> tuple[int, bool, int]:
        together.wait()
        found = card.lease("a", 4096)
        writes = found.must_be_filled
        if writes:
            found.memory.fill_(5)
            found.fill()
        return found.owner, writes, int(found.memory.sum())

    with ThreadPoolExecutor(len(cards)) as threads:
        found = list(threads.map(lease, cards))
    assert [owner for owner, _, _ in found] == [found[0][0]] * 8
    assert sorted(writes for _, writes, _ in found) == [False] * 7 + [True]
    assert {total for _, _, total in found} == {5 * 4096}
    assert owners(place) == [found[0][0]]


def test_a_second_owner_cannot_be_started(make: Make, place: Path) -> None:
    card = make()
    owner = filled(card, "a", 1).owner
    (lock,) = place.glob("*.lock")
    descriptor = os.open(lock, os.O_RDWR)
    try:
        assert not device_sharing.try_lock(descriptor)
    finally:
        os.close(descriptor)
    assert owners(place) == [owner]


def test_nobody_else_can_come_near(make: Make, place: Path) -> None:
    filled(make(), "a", 1)
    for path in place.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_after_the_owners_death_nothing_is_trusted_and_another_takes_over(make: Make) -> None:
    first, second = make(), make()
    wrote, reads = filled(first, "a", 7), second.lease("a", 4096)
    os.kill(wrote.owner, signal.SIGKILL)
    wait_until(lambda: wrote.told() and reads.told())
    assert wrote.trouble() == reads.trouble() == "the process that owned it is gone"
    again = filled(second, "a", 8)
    assert again.owner != wrote.owner
    assert first.lease("a", 4096).memory.eq(8).all()


def test_a_socket_that_was_left_behind_is_replaced(make: Make, place: Path) -> None:
    card = make()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(place / f"{card._name}.sock"))
    assert filled(card, "a", 1).trouble() == ""


def test_a_job_that_dies_while_it_writes_is_followed_by_one_that_waits(make: Make, place: Path) -> None:
    card = make()
    filled(card, "other", 1)
    job = Job(place)
    handle = job.ask(want="a", nbytes=4096)
    assert handle["checksum"] is None
    with ThreadPoolExecutor(1) as thread:
        waits = thread.submit(card.lease, "a", 4096)
        third = Job(place)  # whoever asks next is answered, while two are at the first piece
        assert third.ask(want="other", nbytes=4096)["checksum"] is not None
        assert not waits.done()
        job.kill()
        lease = waits.result(20)
    third.kill()
    assert lease.must_be_filled  # and in other memory, to which the dead one's copies do not go
    lease.memory.fill_(3)
    lease.fill()
    assert make().lease("a", 4096).memory.eq(3).all()


def test_a_dead_jobs_lease_ends(make: Make, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(16 * MIB))
    card = make()
    filled(card, "a", 1, 4 * MIB)
    gc.collect()
    job = Job(place)
    assert job.ask(want="a", nbytes=4 * MIB)["checksum"] is not None
    with pytest.raises(StoreUnavailable, match="do not fit"):
        card.lease("b", 8 * MIB)
    job.kill()

    def fits() -> bool:
        try:
            return card.lease("b", 8 * MIB).must_be_filled
        except StoreUnavailable:
            return False

    wait_until(fits)


def test_the_least_recently_used_go_and_never_one_in_use(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(20 * MIB))
    card = make(0.5)
    held = filled(card, "held", 1, 4 * MIB)
    for key in ("old", "new", "old"):
        lease = card.lease(key, 3 * MIB)
        if lease.must_be_filled:
            lease.memory.fill_(2)
            lease.fill()
        del lease
    third = filled(card, "third", 3, 3 * MIB)  # 10 MiB may be shared: one of the two goes
    assert not card.lease("old", 3 * MIB).must_be_filled
    with pytest.raises(StoreUnavailable, match=r"do not fit: of 10,485,760 that may be shared 7,340,032 are in use"):
        card.lease("too much", 4 * MIB)
    del third
    assert filled(card, "new", 4, 3 * MIB).trouble() == ""
    assert held.memory.eq(1).all()
    assert held.trouble() == ""


def test_a_full_card_has_what_nobody_uses_go(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # Others have taken of it: the budget alone would let both be there
    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(8 * MIB))
    card = make(1.0)
    filled(card, "a", 1, 5 * MIB)  # rounded up to 6 MiB on the card
    second = filled(card, "b", 1, 3 * MIB)
    with pytest.raises(StoreUnavailable, match="CUDA_ERROR_OUT_OF_MEMORY"):
        card.lease("a", 5 * MIB)  # not there any more, and nothing is left to go
    assert second.trouble() == ""


def test_what_somebody_writes_to_is_withdrawn(make: Make) -> None:
    first, second, third = make(), make(), make()
    wrote, reads = filled(first, "a", 7), second.lease("a", 4096)
    reads.memory.view(torch.float32)[100] = 1.5
    assert wrote.trouble() == "somebody wrote to it"
    wait_until(reads.told)
    assert reads.trouble() == "somebody wrote to it"
    for card in (first, second):
        with pytest.raises(StoreUnavailable, match="a model in some job writes to its weights"):
            card.lease("a", 4096)
    assert third.lease("a", 4096).must_be_filled
    assert wrote.memory[1] == 7  # and stays while somebody has it


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("cuIpcOpenMemHandle_v2=400", r"cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_HANDLE \(400\)"),
        ("cuIpcGetMemHandle=801", r"cuIpcGetMemHandle: CUDA_ERROR \(801\)"),
        ("cuMemAlloc_v2=2", r"cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY \(2\)"),
    ],
)
def test_what_the_driver_refuses_is_told(function: str, told: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    card = make()
    monkeypatch.setenv("FAKE_CUDA_FAIL", function)
    with pytest.raises(StoreUnavailable, match=told):
        card.lease("a", 4096)


def test_an_owner_without_a_card_says_so(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    card = make()
    monkeypatch.setenv("FAKE_CUDA_UUID", "17")  # the owner finds another
    with pytest.raises(StoreUnavailable, match=r"the owner's card is GPU-11000000.*, and not GPU-ab000000"):
        card.lease("a", 4096)


def test_owners_that_end_at_once_are_not_started_for_ever(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sharing, "_OWNER", "")
    monkeypatch.setattr(device_sharing, "PATIENCE", 0.5)
    with pytest.raises(StoreUnavailable, match="does not answer"):
        make().lease("a", 4096)


def test_an_owner_that_does_not_answer_is_not_asked_again_soon(
    make: Make, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_sharing, "PATIENCE", 0.2)
    card = make()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
        deaf.bind(str(place / f"{card._name}.sock"))
        deaf.listen()
        with pytest.raises(StoreUnavailable, match="does not answer in time"):
            card.lease("a", 4096)
    with pytest.raises(StoreUnavailable, match="does not answer in time"):
        card.lease("a", 4096)
    assert not owners(place)


def test_no_driver_no_card(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libnothing-of-that-name.so.1")
    cuda_driver._driver.cache_clear()
    with pytest.raises(StoreUnavailable, match="the CUDA driver's library cannot be used"):
        Card(torch.device("cpu"), 0.5, place)


def test_instances_of_a_split_card_share_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-b1b1")
    with pytest.raises(StoreUnavailable, match="in MIG mode"):
        Card(torch.device("cpu"), 0.5, place)


def test_the_owner_ends_with_the_last_job_however_that_ended(make: Make, place: Path) -> None:
    card = make()
    owner = filled(card, "a", 1).owner
    job = Job(place)
    assert job.owner == owner
    card.close()
    gc.collect()
    job.kill()
    wait_until(lambda: not owners(place), 10)
    assert [path.suffix for path in place.iterdir()] == [".lock"]


FORKS = """
import os, sys
from pathlib import Path
import torch
from zcinfer.device_sharing import Card
card = Card(torch.device("cpu"), 0.5, Path(sys.argv[1]))
lease = card.lease("a", 4096)
lease.fill()
if os.fork() == 0:
    sys.stdin.read()  # lives as long as the test lets it
    os._exit(0)
print(lease.owner, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_a_forked_child_holds_nothing(make: Make, place: Path) -> None:
    make()  # the library is where child processes find it
    command = [sys.executable, "-c", FORKS, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        owner = int(parent.stdout.readline())
        assert parent.wait(20) == 0
        wait_until(lambda: owner not in owners(place), 10)  # while the child is there


def test_garbage_ends_a_connection_and_nothing_else(make: Make, place: Path) -> None:
    card = make()
    lease = filled(card, "a", 1)
    (path,) = place.glob("*.sock")
    for garbage in (b"\0\xff\n", b"[1]\n", b'{"want": "b"}\n', b'{"filled": "x"}\n', b"x" * 200_000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.connect(str(path))
            line.settimeout(10)
            assert b"owner" in line.recv(100)
            with pytest.MonkeyPatch.context():
                try:
                    line.sendall(garbage)
                    assert line.recv(100) == b""
                except ConnectionError:
                    pass
    assert lease.trouble() == ""
    assert filled(card, "b", 2).owner == lease.owner


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_directory_that_others_can_enter_is_refused(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = private_runtime_directory()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(mode)
    with pytest.raises(StoreUnavailable, match="not a directory of yours alone"):
        private_runtime_directory()


def test_a_link_in_the_place_of_the_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / f"zcinfer-gpu-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreUnavailable, match="not a directory of yours alone"):
        private_runtime_directory()
