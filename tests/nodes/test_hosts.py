"""Several hosts, each with its own network, shared memory and files: what goes over their links, and what comes out."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from processes import wait_until

from zcinfer.benchmarks.hosts import Command, Network, commands, network, why_not

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
    pytest.mark.timeout(280),
]

PORT, RAY_PORT = 8786, 6379

# A program on the head: publishes, and does what it is told by lines of its standard input.
PROGRAM = """
import json, logging, sys
import dask.array as da, numpy as np, torch
from distributed import Client
import zcinfer as zc
from zcinfer.catalog import ready
from zcinfer.errors import StoreFull

def model(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(500, 10_000), torch.nn.ReLU(), torch.nn.Linear(10_000, 3)).eval()

async def load(ref):
    import asyncio
    from zcinfer.loading import load_ref
    await asyncio.to_thread(load_ref, ref)

told = []

class Told(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())

def main():
    logging.getLogger("zcinfer").addHandler(Told())
    torch.set_num_threads(1)  # as the workers have, for equal bits
    with Client(sys.argv[1]) as client:
        zc.connect(sys.argv[2])
        refs = {}
        for line in sys.stdin:
            verb, seed = line.split()
            if verb == "put":
                refs[seed] = zc.put(model(int(seed)), f"m{seed}")
                answer = refs[seed].nbytes
            elif verb == "told":
                answer = told
            elif verb == "digest":
                answer = refs[seed].digest
            elif verb == "load":  # by all workers of all nodes at the same moment
                client.run(load, ready(refs[seed]))
                answer = len(client.scheduler_info()["workers"])
            elif verb == "squeeze":  # a model that leaves room for one other; names of what the store holds then
                try:
                    large = torch.nn.utils.skip_init(torch.nn.Linear, 1000, 51_000, bias=False).eval()
                    torch.nn.init.zeros_(large.weight)
                    zc.put(large, "large")
                    names = {version.digest: version.name for version in zc.connect().registry.names.versions()}
                    answer = [names[digest] for digest in zc.connect().budget().models]
                except StoreFull:
                    answer = []
            elif verb == "prefetch":
                answer = json.loads(zc.prefetch(f"m{seed}").to_json(orient="records"))
            else:
                x = np.random.default_rng(int(seed)).random((120, 500), dtype=np.float32)
                y = zc.predict(f"m{seed}", da.from_array(x, chunks=(10, 500)), batch_size=10)
                workers = sorted(client.scheduler_info()["workers"])
                parts = [client.compute(b, workers=workers[i % len(workers)])
                         for i, b in enumerate(y.to_delayed().ravel())]
                with torch.inference_mode():
                    want = torch.cat([model(int(seed))(torch.from_numpy(x[i : i + 10])) for i in range(0, 120, 10)])
                answer = bool(np.array_equal(np.concatenate(client.gather(parts)), want.numpy()))
            print(json.dumps(answer), flush=True)

if __name__ == "__main__":
    main()
"""


class Cluster:
    """A node on each host, two workers each, and a program on the head."""

    def __init__(self, net: Network, started: list[Command]):
        self.net = net
        head, *others = net.hosts
        self.scheduler = f"tcp://{head.address}:{PORT}"
        started.append(Command("--head", "--host", head.address, "--workers", "2", host=head).ready())
        token = head.path("zcinfer/ray-token")
        for host in others:
            shutil.copy(token, host.path("token"))
            arguments = ("--join", self.scheduler, "--token-file", "/mnt/token", "--workers", "2")
            started.append(Command(*arguments, host=host))
        for command in started:
            command.ready()
        self.commands = started
        head.path("program.py").write_text(PROGRAM)
        self.program = head.python("/mnt/program.py", self.scheduler, f"ray:{head.address}:{RAY_PORT}")

    def ask(self, verb: str, seed: int) -> Any:
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        print(verb, seed, file=self.program.stdin, flush=True)
        answer = self.program.stdout.readline()
        assert answer, "the program on the head has failed"
        return json.loads(answer)

    def received(self) -> dict[str, int]:
        """Bytes by address."""
        return {address: received for address, (_, received) in self.net.traffic().items()}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with network(3) as net, commands() as started:
        for host in net.hosts:
            # After a cut a connection may be silent for as long as the kernel doubles its patience
            host.environment["DASK_ZCINFER__RAY__TIMEOUT"] = "60"
            host.environment["DASK_ZCINFER__RAY__OBJECT_STORE_MEMORY"] = "240 MB"
            host.environment["DASK_ZCINFER__STORE_EVICTION"] = "true"
        cluster = Cluster(net, started)
        yield cluster
        assert cluster.program.stdin is not None
        assert cluster.program.stdout is not None
        cluster.program.stdin.close()
        assert cluster.program.wait(30) == 0
        cluster.program.stdout.close()


# A program on a member: has a model mapped until it is told to end
USE = """
import sys
from zcinfer.loading import load_ref, loads
from zcinfer.store import ModelRef

model = load_ref(ModelRef("used", 1, sys.argv[2], 0, sys.argv[1]))
before = model[0].weight.sum().item()
for line in sys.stdin:
    print(loads[-1].store, model[0].weight.sum().item() == before, flush=True)
"""


def test_what_other_machines_use_stays_and_what_they_do_not_goes(cluster: Cluster) -> None:
    """The first test of this cluster: what is left of others would lie about in the memory that one model takes."""
    head, member = cluster.net.hosts[0], cluster.net.hosts[1]
    for seed in (20, 21):
        cluster.ask("put", seed)
        cluster.ask("load", seed)  # now all machines have a copy
    member.environment["DASK_ZCINFER__RAY__TOKEN_FILE"] = "/mnt/token"
    member.path("use.py").write_text(USE)
    url = f"ray:{head.address}:{RAY_PORT}?registry=%2Fmnt%2Fregistry&auth=own"
    with member.python("/mnt/use.py", url, cluster.ask("digest", 20)) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def used() -> str:
            print(file=program.stdin, flush=True)
            return program.stdout.readline().strip()  # type: ignore[union-attr]

        assert used() == "ray True"
        held: list[str] = []

        def has_squeezed() -> bool:
            held[:] = cluster.ask("squeeze", 0)
            return "large" in held

        wait_until(has_squeezed, 60)  # readers keep for some seconds what they have used
        assert "m20" in held
        assert "m21" not in held
        assert used() == "ray True"
        program.stdin.close()
    # What has gone is put and pulled anew, and what was in its place goes
    assert cluster.ask("compare", 21) is True


def test_put_says_who_does_not_see_the_registry(cluster: Cluster) -> None:
    cluster.ask("put", 0)
    cluster.ask("put", 10)
    (said,) = [text for text in cluster.ask("told", 0) if "do not see" in text]  # once
    assert "these machines of the cluster do not see it: 10.77.0.2, 10.77.0.3." in said
    assert "zcinfer.remote" in said
    assert "zcinfer.registry" in said


def test_two_workers_that_ask_at_once_bring_a_model_to_their_host_once(cluster: Cluster) -> None:
    cluster.ask("put", 0)
    cluster.ask("load", 0)  # imports, and Ray's connections
    nbytes = cluster.ask("put", 1)
    before = cluster.received()
    assert cluster.ask("load", 1) == 6
    after = cluster.received()
    _, *others = cluster.net.hosts
    for host in others:
        assert nbytes < after[host.address] - before[host.address] < 1.15 * nbytes
    # Nothing went to the head, which has it
    head = cluster.net.hosts[0].address
    assert after[head] - before[head] < 0.1 * nbytes


def test_prefetch_brings_it_and_no_load_waits_for_the_network(cluster: Cluster) -> None:
    nbytes = cluster.ask("put", 2)
    rows = {row["node"]: row for row in cluster.ask("prefetch", 2)}
    head, *others = [host.address for host in cluster.net.hosts]
    assert rows[head]["bytes"] == 0
    assert all(rows[other]["bytes"] == pytest.approx(nbytes, rel=0.01) for other in others)
    assert {row["workers"] for row in rows.values()} == {2}
    before = cluster.received()
    cluster.ask("load", 2)
    assert all(received - before[address] < 0.1 * nbytes for address, received in cluster.received().items())


def test_a_job_over_all_nodes_is_equal_to_plain_torch(cluster: Cluster) -> None:
    cluster.ask("put", 3)
    assert cluster.ask("compare", 3) is True


# A program on a member: loads a model, when it is told to
LOAD = """
import json, sys, time
import torch
from zcinfer import errors, loading
from zcinfer.store import ModelRef
from zcinfer.stores import open_store

ref = ModelRef("cut", 1, sys.argv[2], 0, sys.argv[1])
open_store(ref.store)
print("ready", flush=True)
sys.stdin.readline()
begin = time.monotonic()
try:
    loading.load_ref(ref)
    said = loading.loads[-1].store
except errors.StoreUnavailable as error:
    said = str(error)
print(json.dumps([said, time.monotonic() - begin]), flush=True)
"""


@pytest.mark.parametrize("registry", ["of the head alone", "of both"])
def test_a_load_that_is_cut_off_ends_in_time_and_says_why(cluster: Cluster, registry: str) -> None:
    head, member = cluster.net.hosts[0], cluster.net.hosts[1]
    seed = 5 if registry == "of both" else 6
    nbytes = cluster.ask("put", seed)
    if registry == "of both":
        shutil.copytree(head.path("registry"), member.path("registry"))
    member.path("load.py").write_text(LOAD)
    settings = {"DASK_ZCINFER__RAY__TIMEOUT": "2", "DASK_ZCINFER__RAY__TOKEN_FILE": "/mnt/token"}
    member.environment |= settings
    url = f"ray:{head.address}:{RAY_PORT}?registry=%2Fmnt%2Fregistry&auth=own"
    with member.python("/mnt/load.py", url, cluster.ask("digest", seed)) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        with cluster.net.slowed(member, "40mbit"):
            before = cluster.received()[member.address]
            print(file=program.stdin, flush=True)
            wait_until(lambda: cluster.received()[member.address] > before + 0.1 * nbytes)
            with cluster.net.cut(member):
                said, seconds = json.loads(program.stdout.readline())
    assert seconds < 10  # 2, and 1 for each 10 MB, and 1 to find out why
    if registry == "of both":
        assert said == "file"
    else:
        assert "its head cannot be reached from" in said
        assert "no directory /mnt/registry" in said


def test_another_clusters_token_is_refused(cluster: Cluster) -> None:
    host = cluster.net.hosts[2]
    with commands() as started:
        started.append(Command("--join", cluster.scheduler, host=host))  # the token that it makes for itself
        assert "refuses the token in /mnt/zcinfer/ray-token" in started[0].refused()


def test_a_node_that_ends_leaves_its_host_as_it_was(cluster: Cluster) -> None:
    """The last test of this cluster: first a member is killed, then the head is interrupted."""
    *_, last = cluster.net.hosts
    cluster.commands[-1].send(signal.SIGKILL)
    wait_until(lambda: len(last.processes()) == 0, 20)
    wait_until(lambda: not list(last.path(".").glob("zcinfer-ray-*")), 20)
    cluster.ask("put", 4)
    assert cluster.ask("compare", 4) is True
    cluster.commands[0].send(signal.SIGINT)
    assert cluster.commands[0].process.wait(20) == 0
    assert cluster.commands[1].process.wait(20) == 1
