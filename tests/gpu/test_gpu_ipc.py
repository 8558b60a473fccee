"""On a card: jobs share one copy of the weights by the driver's own memory handles."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
from test_upload import assert_alike, fetch, joined
from torch import nn

from zcinfer import config, device_sharing, loading, upload
from zcinfer.errors import DeviceLost
from zcinfer.publishing import put

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

# Prints what it has of the card, how long the load took, and an output
JOB = """
import json, sys
import torch
from zcinfer import loading
from zcinfer.store import ModelRef
small, big = (ModelRef(*each) for each in json.loads(sys.argv[1]))
with loading.residents.lend(small, "cuda", "refuse"):
    pass  # context, pinned memory and connection are once a process
torch.cuda.synchronize()
before, _ = torch.cuda.mem_get_info()
with loading.residents.lend(big, "cuda", "refuse") as model, torch.inference_mode():
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info()
    out = model(torch.ones(1, 4096, device="cuda")).double().sum().item()
load = loading.loads[-1]
print(json.dumps({"took": before - after, "seconds": load.load_seconds, "phases": load.seconds, "out": out}))
"""


def wide(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(4))).eval()


@pytest.fixture(autouse=True)
def _shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    directory = tempfile.TemporaryDirectory(prefix="zc-")  # a socket's path must be short
    monkeypatch.setenv("XDG_RUNTIME_DIR", directory.name)
    monkeypatch.setenv("DASK_ZCINFER__GPU__SHARE", "true")  # for other processes
    asked = config.get
    monkeypatch.setattr(config, "get", lambda key: key == "gpu.share" or asked(key))
    upload._told.clear()
    with directory:
        yield
        loading.residents.clear()
        for card in device_sharing._cards.values():
            card.close()
        device_sharing._cards.clear()


def test_a_second_job_takes_five_milliseconds_and_no_memory(registry: Path) -> None:
    """Read ``-rP`` for the figures."""
    small, big = put(wide(600, 0), "small"), put(model := wide(4096, 1), "big")  # 268 MB
    ours = upload.to_device(joined(fetch(big)), fetch(big), torch.device("cuda"), share=True)
    assert ours.leases, "nothing is shared: see the warning"
    assert_alike(ours.model, joined(fetch(big)))
    refs = [[r.name, r.version, r.digest, r.nbytes, r.store] for r in (small, big)]
    done = subprocess.run([sys.executable, "-c", JOB, json.dumps(refs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    with torch.inference_mode():
        expected = model.cuda()(torch.ones(1, 4096, device="cuda")).double().sum().item()
    assert found["out"] == pytest.approx(expected, rel=1e-4, abs=1e-2)
    assert found["took"] < 0.01 * big.nbytes + 2 * (2 << 20)
    assert found["seconds"] < 0.005
    assert ours.leases[0].trouble() == ""


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    deadline = monotonic() + 20
    with suppress(OSError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert monotonic() < deadline
            sleep(0.01)


def test_an_owner_that_is_killed_is_replaced(registry: Path) -> None:
    model = wide(1024, 0)
    ref = put(model, "model")
    with loading.residents.lend(ref, "cuda", "refuse"):
        pass
    ((resident,),) = loading.residents._free.values()
    owner = resident._leases[0].owner  # type: ignore[attr-defined]
    with (
        pytest.raises(DeviceLost, match="the process that owned it is gone"),
        loading.residents.lend(ref, "cuda", "refuse"),
    ):
        kill(owner)
    with loading.residents.lend(ref, "cuda", "refuse") as again:
        assert_alike(again, joined(fetch(ref)))


def test_writes_are_found(registry: Path) -> None:
    ref = put(wide(1024, 0), "model")
    with pytest.raises(DeviceLost, match="somebody wrote to it"), loading.residents.lend(ref, "cuda", "refuse") as lent:
        next(lent.parameters()).data[3, 4] += 1
    with loading.residents.lend(ref, "cuda", "refuse") as again:
        assert_alike(again, joined(fetch(ref)))
