"""Workers on GPUs: the environment, name, resources and CPUs that each really has. With a driver library of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nvml
import pytest
from nvml import FIRST, SECOND, WHOLE

from zcinfer.cluster import check_unpinned
from zcinfer.device import Device
from zcinfer.errors import SettingsError
from zcinfer.node import Workers
from zcinfer.pinning import Pinning


def script(body: str, directory: Path, environment: dict[str, str]) -> Any:
    """The JSON that a script prints in its last line."""
    path = directory / "script.py"
    path.write_text(BEGIN + body)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "FAKE_NVML_"))}
    own = {"TMPDIR": str(directory), "FAKE_NVML_CPUS": f"{1 << min(os.sched_getaffinity(0)):x},8000000000000000"}
    done = subprocess.run(
        [sys.executable, str(path)], env=clean | own | environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# What a worker's process can have at its birth alone: variables that are there while it imports the script.
BEGIN = """
import json, os, signal, sys
import zcinfer as zc

SHOWN = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER")

def look(dask_worker):
    import zcinfer.config
    return {
        "born": list(sys.modules["__mp_main__"].SHOWN),
        "now": [os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER")],
        "resources": dask_worker.state.total_resources,
        "cpus": sorted(os.sched_getaffinity(0)),
        "jobs": zcinfer.config.get("jobs"),
        "pid": os.getpid(),
    }

def looked(client):
    names = {address: known["name"] for address, known in client.scheduler_info(n_workers=-1)["workers"].items()}
    return {names[address]: seen for address, seen in client.run(look).items()}
"""

ONE = """
if __name__ == "__main__":
    before = dict(os.environ)
    with zc.LocalCluster(gpus="MIG-b1b1b1b1-0000-0000-0000-000000000002", dashboard=False) as cluster:
        with cluster.get_client() as client:
            found = looked(client)
    cuda = {name: value for name, value in os.environ.items() if name.startswith("CUDA_")}
    print(json.dumps([found, cuda, sorted({"torch", "pynvml"} & set(sys.modules))]))
"""

FOUR = """
if __name__ == "__main__":
    import time
    from zcinfer.errors import SettingsError

    def until(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    options = {"gpus": [0, "MIG-b1b1b1b1-0000-0000-0000-000000000002"], "jobs_per_gpu": 2, "resources": {"disk": 1}}
    with zc.LocalCluster(**options) as cluster, cluster.get_client() as client:
        workers = cluster.scheduler.workers
        first = looked(client)
        died = first["gpu1-mig2-job1"]["pid"]
        os.kill(died, signal.SIGKILL)
        until(lambda: cluster.workers["gpu1-mig2-job1"].pid not in (None, died) and len(workers) == 4)
        again = looked(client)
        cluster.scale(2)
        until(lambda: len(workers) == 2)
        left = sorted(worker.name for worker in workers.values())
        cluster.scale(3)
        until(lambda: len(workers) == 3)
        more = sorted(worker.name for worker in workers.values())
        try:
            cluster.scale(5)
        except SettingsError as error:
            print(json.dumps([first, again, cluster.gpus, left, more, str(error)]))
"""


@pytest.mark.slow
def test_a_worker_is_born_with_its_gpu(driver: dict[str, str], tmp_path: Path) -> None:
    parents = {"CUDA_VISIBLE_DEVICES": f"0,{SECOND}"}
    found, cuda, imported = script(ONE, tmp_path, driver | parents)
    (name,) = found
    assert name == "gpu1-mig2-job0"
    assert found[name]["born"] == found[name]["now"] == [SECOND, "PCI_BUS_ID"]
    assert found[name]["resources"] == {"GPU": 1}
    assert found[name]["jobs"] == 1
    # What hands out GPUs has started no CUDA, and its own environment is what it was.
    assert (cuda, imported) == (parents, ["pynvml"])


@pytest.mark.slow
def test_several_jobs_on_several_gpus(driver: dict[str, str], tmp_path: Path) -> None:
    first, again, told, left, more, beyond = script(FOUR, tmp_path, driver)
    cpu = min(os.sched_getaffinity(0))
    everywhere = sorted(os.sched_getaffinity(0))
    expected = {
        f"{label}-job{job}": ([uuid, "PCI_BUS_ID"], cpus)
        for label, uuid, cpus in [("gpu0", WHOLE, [cpu]), ("gpu1-mig2", SECOND, everywhere)]
        for job in range(2)
    }
    for found in (first, again):
        assert {name: (seen["born"], seen["cpus"]) for name, seen in found.items()} == expected
        for seen in found.values():
            assert seen["now"] == seen["born"]
            assert seen["resources"] == {"GPU": 0.5, "disk": 1}
            assert seen["jobs"] == 2
    died = "gpu1-mig2-job1"
    assert again.pop(died)["pid"] != first.pop(died)["pid"]
    assert again == first
    assert told == [
        f"GPU 0 (NVIDIA H100, {WHOLE}), 2 jobs, CPUs {cpu}",
        f"GPU {SECOND} (NVIDIA H100 MIG 1g.10gb), 2 jobs, "
        "not bound to CPUs: this process may not use CPUs 63, which are near it",
    ]
    assert left == ["gpu0-job0", "gpu1-mig2-job0"]  # one on each
    assert more == ["gpu0-job0", "gpu0-job1", "gpu1-mig2-job0"]
    assert "the 4 workers that gpus= and jobs_per_gpu=2 give places to are there" in beyond


OTHERS = """
if __name__ == "__main__":
    import subprocess
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=0, dashboard_address=None) as cluster, Client(cluster) as client:
        command = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address]
        options = ["--host", "127.0.0.1", "--preload", "zcinfer.worker", "--nthreads", "1", "--name", "mine"]
        options += ["--local-directory", os.environ["TMPDIR"]]
        worker = subprocess.Popen([*command, *options], env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"})
        try:
            client.wait_for_workers(1, timeout=30)
            cpus = client.run(lambda: sorted(os.sched_getaffinity(0)))
            names = [known["name"] for known in client.scheduler_info()["workers"].values()]
        finally:
            worker.terminate()
            worker.wait(20)
        print(json.dumps([names, *cpus.values()]))
"""


@pytest.mark.slow
def test_workers_that_others_start_keep_their_name_and_to_their_gpu(driver: dict[str, str], tmp_path: Path) -> None:
    names, cpus = script(OTHERS, tmp_path, driver)
    assert names == ["mine"]
    assert cpus == [min(os.sched_getaffinity(0))]


REFUSED = """
import json, sys
from click.testing import CliRunner
from zcinfer.cli import main

def refused(*arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    return result.output

print(json.dumps([
    [refused(*verb, *options.split()) for verb in (["cluster"], ["node", "--head"], ["run", "none", "x", "y"])]
    for options in ("--gpus 0,7", "--gpus 1", "--gpus all --workers 2", "--jobs-per-gpu 2")
]))
"""


def test_what_the_command_line_refuses(driver: dict[str, str]) -> None:
    told = json.loads(nvml.run(REFUSED, driver))
    expected = [
        "there is no GPU 7 on this machine",
        f"GPU 1 is in MIG mode, where a process gets one of its instances: name some of {FIRST}, {SECOND}",
        "2 workers (n_workers=, --workers) and GPUs",
        "jobs_per_gpu=2 needs GPUs to be on",
    ]
    for outputs, said in zip(told, expected, strict=True):
        assert all(said in output for output in outputs)


RUN = """
from pathlib import Path
import numpy as np, torch, zarr
from click.testing import CliRunner
from zcinfer.cli import main

class Where(torch.nn.Module):
    def forward(self, x):
        if type(x) is torch.Tensor:
            (Path(__file__).parent / f"at-{os.getpid()}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        return x * 2

if __name__ == "__main__":
    folder = Path(__file__).parent
    os.environ["DASK_ZCINFER__REGISTRY"] = str(folder / "registry")
    import dask
    dask.config.set({"zcinfer.registry": str(folder / "registry")})
    zc.connect("file")
    zc.put(Where().eval(), "where")
    zarr.create_array(str(folder / "x.zarr"), data=np.ones((40, 2), "f4"), chunks=(1, 2))
    done = CliRunner().invoke(main, ["run", "where", str(folder / "x.zarr"), str(folder / "y.zarr"), "--store", "file",
                                     "--gpus", "0", "--jobs-per-gpu", "2", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    seen = {path.read_text() for path in folder.glob("at-*")}
    print(json.dumps([done.output, sorted(seen), float(zarr.open_array(str(folder / "y.zarr"))[:].sum())]))
"""


@pytest.mark.slow
def test_a_run_on_gpus(driver: dict[str, str], tmp_path: Path) -> None:
    output, seen, total = script(RUN, tmp_path, driver)
    assert seen == [WHOLE]
    assert total == 160
    assert "0 (" in output
    assert "2 jobs" in output


LOST = """
from pathlib import Path
import numpy as np, torch, dask.array as da
from time import monotonic

FOLDER = Path(__file__).parent

class Falls(torch.nn.Module):
    def forward(self, x):
        if type(x) is torch.Tensor and os.environ["CUDA_VISIBLE_DEVICES"].startswith("GPU-"):
            (FOLDER / "fail").write_text("nvmlDeviceGetUUID@0=15")
            error = torch.AcceleratorError("CUDA error: unknown error")
            error.error_code = 999
            raise error
        return x * 2

if __name__ == "__main__":
    os.environ["DASK_ZCINFER__REGISTRY"] = str(FOLDER / "registry")
    import dask
    dask.config.set({"zcinfer.registry": str(FOLDER / "registry")})
    zc.connect("file")
    zc.put(Falls().eval(), "falls")
    x = np.arange(120, dtype="f4").reshape(60, 2)
    with zc.LocalCluster(gpus="all", threads_per_worker=1, dashboard=False) as cluster, cluster.get_client() as client:
        before = {name: nanny.pid for name, nanny in cluster.workers.items()}
        fallen = cluster.workers["gpu0-job0"]
        y = zc.predict("falls", da.from_array(x, chunks=(1, 2)), batch_size=1, device="cpu").compute()
        end = monotonic() + 30
        while fallen.status.name != "closed" and monotonic() < end:
            client.run(int)
        names = sorted(known["name"] for known in client.scheduler_info(n_workers=-1)["workers"].values())
        same = {name for name, nanny in cluster.workers.items() if nanny.pid == before[name]}
        print(json.dumps([bool((y == 2 * x).all()), fallen.status.name, names, sorted(same)]))
"""


@pytest.mark.slow
def test_a_card_that_is_lost_takes_its_own_job_with_it(driver: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "fail").write_text("")
    right, status, names, same = script(LOST, tmp_path, driver | {"FAKE_NVML_FAIL": str(tmp_path / "fail")})
    assert right
    assert status == "closed"
    assert names == same == ["gpu1-mig0-job0", "gpu1-mig2-job0"]


def test_what_says_twice_which_gpu_is_refused() -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        with pytest.raises(SettingsError, match=f"env= may not have {name}"):
            check_unpinned(None, {name: "0"})
    check_unpinned(None, {"COLOUR": "blue"})


def test_workers_of_a_node_are_named_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pinning = Pinning((Device(0, WHOLE), Device(1, SECOND, instance=2)), 2)
    monkeypatch.setattr(Pinning, "of", lambda *_: pinning)
    workers = Workers(gpus="all", jobs_per_gpu=2)
    options = workers.options("10.0.0.2")
    assert workers.count == 4
    assert [own["name"] for own in options] == [
        f"10.0.0.2-{label}-job{job}" for job in range(2) for label in ("gpu0", "gpu1-mig2")
    ]
    assert [own["env"]["CUDA_VISIBLE_DEVICES"] for own in options] == [WHOLE, SECOND] * 2
    assert all(own["env"]["OMP_NUM_THREADS"] and own["config"]["zcinfer"]["jobs"] == 2 for own in options)
    assert all(own["resources"] == {"GPU": 0.5} for own in options)
