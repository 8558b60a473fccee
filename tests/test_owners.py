"""What owns a model is lost while models are in use: the owner of its object, and the head of its Ray.

A holder that is killed and a raylet that is killed are in test_store, a network that is cut in nodes/test_hosts.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from processes import processes_below, wait_until

from zcinfer.benchmarks.hosts import Command, commands

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HOST = "127.0.0.2"

# Does what lines of its standard input say, and prints what came of it
PROGRAM = """
import sys
import torch
import zcinfer as zc
from zcinfer import loading, ray_store, stores
from zcinfer.store import ModelRef

stores.PATIENCE = ray_store.PATIENCE = 0.2  # seconds for which a store that has died is left alone
torch.manual_seed(0)
model, kept = torch.nn.Linear(300, 300).eval(), None
for line in sys.stdin:
    verb, *arguments = line.split()
    if verb == "put":
        zc.connect("ray:" + arguments[0])
        ref = zc.put(model, "owned")
        print("answer", ref.digest, ref.store, flush=True)
    elif verb == "kill":  # the holder, which is started again and has nothing
        import ray
        store = stores.open_store(ref.store)
        ray.kill(store._holder, no_restart=False)
        while ref.digest in store.usage()[2]:
            pass
        print("answer killed", flush=True)
    elif verb == "connect":
        stores.open_store(arguments[1])
        print("answer connected", flush=True)
    else:
        found = loading.load_ref(ModelRef("owned", 1, arguments[0], 0, arguments[1]))
        kept = kept or found
        same = torch.equal(found.weight, model.weight) and torch.equal(kept.weight, model.weight)
        print("answer", loading.loads[-1].store, "equal" if same else "different", flush=True)
        del found
"""


class Program:
    """One that does what it is told."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=pipe, stdout=pipe, text=True)

    def ask(self, *words: str) -> list[str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(*words, file=self.process.stdin, flush=True)
        # Ray prints there too
        found = next((line.split()[1:] for line in self.process.stdout if line.startswith("answer ")), None)
        assert found is not None, "the program has failed"
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind((HOST, 0))
        return int(trial.getsockname()[1])


class Head:
    """The head of a cluster without workers, which can be killed and started again."""

    def __init__(self, started: list[Command], place: Path):
        self._started, self._place = started, place
        self._ports = [free_port(), free_port()]
        self.address = f"{HOST}:{self._ports[1]}"

    def start(self) -> None:
        port, ray_port = map(str, self._ports)
        options = ("--host", HOST, "--port", port, "--ray-port", ray_port, "--workers", "0")
        self._started.append(Command("--head", *options, TMPDIR=str(self._place)).ready())

    def kill(self) -> None:
        self._started[-1].process.kill()
        wait_until(lambda: not processes_below(self._place))


@pytest.fixture
def head(registry: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    place = Path(tempfile.mkdtemp(prefix="zco-", dir="/tmp"))
    monkeypatch.setenv("DASK_ZCINFER__REGISTRY", str(registry))
    monkeypatch.setenv("DASK_ZCINFER__RAY__OBJECT_STORE_MEMORY", "100MB")
    with commands() as started:
        head = Head(started, place)
        head.start()
        yield head
    wait_until(lambda: not processes_below(place))
    shutil.rmtree(place)


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    with ExitStack() as stack:
        programs = [Program(), Program()]
        for program in programs:
            stack.callback(program.close)
        yield programs


def test_an_object_whose_owner_has_died_is_put_again(head: Head, programs: list[Program]) -> None:
    publisher, reader = programs
    model = publisher.ask("put", head.address)
    assert reader.ask("connect", *model) == ["connected"]  # it is told of the object, and does not hold it yet
    assert publisher.ask("kill") == ["killed"]
    assert reader.ask("load", *model) == ["ray", "equal"]


def test_a_head_that_comes_back_is_found_again(head: Head, programs: list[Program]) -> None:
    publisher, reader = programs
    model = publisher.ask("put", head.address)
    assert reader.ask("load", *model) == ["ray", "equal"]
    head.kill()
    begin = time.monotonic()
    assert reader.ask("load", *model) == ["file", "equal"]
    assert time.monotonic() - begin < 12
    head.start()
    # It has none of the models, and puts them again
    wait_until(lambda: reader.ask("load", *model) == ["ray", "equal"])
