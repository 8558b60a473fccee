"""A node of a cluster: what it refuses, what two of them do together, and that nothing stays of either."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from distributed import Client, Scheduler
from processes import living, processes_below, wait_until

import zcinfer as zc
from zcinfer import catalog, joining, keeper, loading
from zcinfer.benchmarks.hosts import Command, commands
from zcinfer.cli import main
from zcinfer.errors import NodeError, SettingsError
from zcinfer.joining import HEAD, Offer, versions
from zcinfer.machines import machines_without
from zcinfer.node import Head, Workers, serve


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as trial:
        trial.bind((host, 0))
        return int(trial.getsockname()[1])


# --- what is refused -----------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> str:
    """Message of a command that is refused."""
    result = CliRunner().invoke(main, ["node", *arguments])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize("arguments", [[], ["--head", "--join", "tcp://127.0.0.1:1"]], ids=["neither", "both"])
def test_a_node_is_head_or_joins(arguments: list[str]) -> None:
    assert "--head on one machine, and --join ADDRESS" in invoke(*arguments)


def test_ports_are_the_heads() -> None:
    assert "--ray-port are the head's" in invoke("--join", "tcp://127.0.0.1:1", "--ray-port", "7000")


def test_a_member_has_workers() -> None:
    assert "one worker at least" in invoke("--join", "tcp://127.0.0.1:1", "--workers", "0")


@pytest.mark.parametrize("text", ["head", "tcp://10.0.0.1", "10.0.0.1:x", ":8786"])
def test_what_is_no_address(text: str) -> None:
    assert "give HOST:PORT" in invoke("--join", text)


def test_an_address_that_is_dead() -> None:
    said = invoke("--join", f"127.0.0.1:{free_port()}")
    assert "nothing answers" in said
    assert "refused" in said
    assert "zcinfer node --head --host" in said


def test_a_head_that_is_not_up_yet_is_waited_for() -> None:
    port = free_port()

    async def late() -> Offer:
        asking = asyncio.create_task(joining.ask(f"127.0.0.1:{port}", wait=30))
        await asyncio.sleep(0)  # it has asked once
        async with Scheduler(host="127.0.0.1", port=port, dashboard=False, dashboard_address="127.0.0.1:0") as head:
            head.set_metadata(keys=[HEAD], value=offer.to_json())
            return await asking

    offer = Offer("127.0.0.1:1", "/models", versions())
    assert asyncio.run(late()) == offer


def test_an_address_of_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "PATIENCE", 0.5)
        assert "no scheduler of Dask" in invoke("--join", f"127.0.0.1:{silent.getsockname()[1]}")


def with_scheduler(metadata: object, act: Callable[[str], Awaitable[Any]]) -> Any:
    """What ``act`` returns for the address of a scheduler with that as the head's offer."""

    async def run() -> Any:
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False, dashboard_address="127.0.0.1:0") as scheduler:
            if metadata is not None:
                scheduler.set_metadata(keys=[HEAD], value=metadata)
            return await act(scheduler.address)

    return asyncio.run(run())


def test_a_scheduler_that_is_no_head_of_ours() -> None:
    with pytest.raises(NodeError, match="not started by `zcinfer node --head`"):
        with_scheduler(None, joining.ask)


def test_packages_that_differ_are_all_named() -> None:
    theirs = versions() | {"ray": "2.55.0", "Python": "3.13"}
    offer = with_scheduler(Offer("127.0.0.1:1", "/models", theirs).to_json(), joining.ask)
    here = versions()
    with pytest.raises(NodeError) as caught:
        offer.check("127.0.0.1")
    assert f"ray is {here['ray']} here and 2.55.0 there" in str(caught.value)
    assert f"Python is {here['Python']} here and 3.13 there" in str(caught.value)
    assert "dask" not in str(caught.value).partition("Install")[0]


def test_ports_in_use_are_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        for option in ("port", "ray-port"):
            said = invoke("--head", "--port", str(free_port()), f"--{option}", str(port))
            assert f"port {port} of 127.0.0.1 is in use by process {os.getpid()}" in said
            assert f"--{option} PORT" in said


def test_an_address_of_another_machine() -> None:
    with pytest.raises(SettingsError, match=r"192\.0\.2\.1.*--host ADDRESS"):
        serve(Head("192.0.2.1"), Workers(), print)


def test_a_name_without_an_address() -> None:
    with pytest.raises(SettingsError, match=r"--host 'no\.such\.invalid'"):
        serve(Head("no.such.invalid"), Workers(), print)


def test_a_memory_limit_that_is_no_size() -> None:
    assert "--memory-limit is 'much'" in invoke("--head", "--memory-limit", "much")


def test_a_token_file_is_there_private_and_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(SettingsError, match="cannot be read"):
        keeper.token_path(str(path))
    path.touch(0o600)
    with pytest.raises(SettingsError, match="is empty"):
        keeper.token_path(str(path))
    path.write_text("ab" * 15)
    with pytest.raises(SettingsError, match="has 30 characters, and must have 32"):
        keeper.token_path(str(path))
    path.write_text("ab" * 32)
    for mode in (0o604, 0o620, 0o644):
        path.chmod(mode)
        with pytest.raises(SettingsError, match=f"mode {mode:o}.*chmod 600"):
            keeper.token_path(str(path))
    for mode in (0o400, 0o440, 0o600):  # a mounted secret belongs to a group
        path.chmod(mode)
        assert keeper.token_path(str(path)) == path


# --- two nodes on addresses of this machine ------------------------------------------------------------------------


class Cluster:
    """A head at 127.0.0.2 and a member at 127.0.0.3, each with one worker."""

    def __init__(self, started: list[Command], place: Path):
        self.place = place
        self.port = free_port("127.0.0.2")
        ray_port = free_port("127.0.0.2")
        self.started = started
        self.head = self.start(
            "--head", "--host", "127.0.0.2", "--port", str(self.port), "--ray-port", str(ray_port)
        ).ready()
        self.ray = f"ray:127.0.0.2:{ray_port}"
        self.scheduler = f"tcp://127.0.0.2:{self.port}"

    def start(self, *arguments: str, **environment: str) -> Command:
        own = {"TMPDIR": str(self.place), "DASK_ZCINFER__RAY__OBJECT_STORE_MEMORY": "200MB"}
        self.started.append(Command(*arguments, "--workers", "1", **own | environment))
        return self.started[-1]

    def join(self, *arguments: str, host: str = "127.0.0.3", **environment: str) -> Command:
        return self.start("--join", self.scheduler, "--host", host, *arguments, **environment)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    place = Path(tempfile.mkdtemp(prefix="zcn-", dir="/tmp"))
    with commands() as started:
        cluster = Cluster(started, place)
        cluster.join().ready()
        yield cluster
    wait_until(lambda: not processes_below(place))
    wait_until(lambda: not list(place.glob("zcinfer-ray-*")))
    shutil.rmtree(place)


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.scheduler) as client:
        zc.connect(cluster.ray)
        yield client
        catalog.disconnect()
        loading.residents.clear()


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(300, 4000), torch.nn.ReLU(), torch.nn.Linear(4000, 7)).eval()


@pytest.mark.ray
@pytest.mark.slow
def test_a_model_comes_to_each_node_once_and_the_job_is_right(client: Client) -> None:
    original = model()
    ref = zc.put(original, "shared")
    first = zc.prefetch("shared", client).set_index("node")
    assert set(first.index) == {"127.0.0.2", "127.0.0.3"}
    assert first.loc["127.0.0.2", "bytes"] == 0
    assert first.loc["127.0.0.3", "bytes"] == pytest.approx(ref.nbytes, rel=0.01)
    assert zc.prefetch("shared", client)["bytes"].sum() == 0

    x = np.random.default_rng(0).random((96, 300), dtype=np.float32)
    y = zc.predict("shared", da.from_array(x, chunks=(8, 300)), batch_size=8)
    addresses = sorted(client.scheduler_info()["workers"])  # of both nodes, in turn
    blocks = y.to_delayed().ravel()
    computed = [client.compute(b, workers=addresses[i % 2]) for i, b in enumerate(blocks)]
    with torch.inference_mode():
        expected = torch.cat([original(torch.from_numpy(x[start : start + 8])) for start in range(0, 96, 8)])
    np.testing.assert_array_equal(np.concatenate(client.gather(computed)), expected.numpy())


@pytest.mark.ray
@pytest.mark.slow
def test_which_machines_do_not_see_a_directory(client: Client, tmp_path: Path) -> None:
    assert machines_without(client, str(tmp_path)) == []
    assert machines_without(client, str(tmp_path / "none")) == ["127.0.0.2", "127.0.0.3"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_program_finds_the_store_by_its_dask_client(client: Client, cluster: Cluster) -> None:
    catalog.disconnect()
    assert zc.connect("ray").url.startswith(cluster.ray)


@pytest.mark.ray
@pytest.mark.slow
def test_the_token_decides_and_is_not_shown(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "token"
    other.touch(0o600)
    other.write_text("cd" * 32)
    said = cluster.join("--token-file", str(other), host="127.0.0.4").refused()
    assert f"refuses the token in {other}" in said
    assert "is a node of this cluster already" in cluster.join().refused()
    token = keeper.token_path().read_text()
    for process in processes_below(cluster.place):
        try:
            assert token not in " ".join(process.cmdline())
            assert token not in process.environ().values()
        except psutil.NoSuchProcess:
            continue
    assert all(token not in command.printed for command in cluster.started)


@pytest.mark.ray
@pytest.mark.slow
def test_dask_listens_on_its_address_alone(cluster: Cluster) -> None:
    for command, host in zip(cluster.started[:2], ("127.0.0.2", "127.0.0.3"), strict=True):
        ours = [command.process.pid, *(p.pid for p in psutil.Process(command.process.pid).children())]
        listening = {
            connection.laddr.ip
            for pid in ours
            for connection in psutil.Process(pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening - {"::"} <= {host, "127.0.0.1"}  # Ray's part of a worker is on all, and asks for the token


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_member_that_ends_leaves_nothing(cluster: Cluster, tmp_path: Path, number: int) -> None:
    place = Path(tempfile.mkdtemp(prefix="zcm-", dir="/tmp"))
    member = cluster.join(host=f"127.0.0.{100 + number}", TMPDIR=str(place)).ready()
    below = psutil.Process(member.process.pid).children(recursive=True)
    assert processes_below(place)
    member.send(number)
    assert member.process.wait(20) == (0 if number != signal.SIGKILL else -signal.SIGKILL)
    wait_until(lambda: not processes_below(place) and not living(below))
    wait_until(lambda: not list(place.glob("zcinfer-ray-*")))
    assert member.printed.count("Ctrl-C ends it here") == 1
    shutil.rmtree(place)


@pytest.mark.ray
@pytest.mark.slow
def test_a_member_ends_with_the_head_that_was_killed(cluster: Cluster) -> None:
    """The last test of this cluster."""
    member = cluster.started[1]
    cluster.head.process.kill()
    assert member.process.wait(20) == 1
    assert f"the head at {cluster.scheduler} has ended or is out of reach" in member.printed
    wait_until(lambda: not processes_below(cluster.place))
