"""Weights that jobs on one card share: one copy, buffers of their own, and no result out of a copy that was lost."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from cuda import Make
from distributed import Client, LocalCluster
from processes import living, wait_until
from sides import Late
from test_upload import assert_alike, fetch, joined, tensors
from torch import nn

from zcinfer import loading, upload
from zcinfer.device_sharing import Card
from zcinfer.errors import DeviceLost
from zcinfer.publishing import put
from zcinfer.residents import Residents
from zcinfer.store import Fetched
from zcinfer.transfer import PinnedSlots
from zcinfer.upload import Moved

CPU = torch.device("cpu")


class Wide(nn.Module):
    """Weights of 4 MB, some tied, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1000, 1000)
        self.norm = nn.BatchNorm1d(1000)
        self.tied = self.layer.weight
        self.register_buffer("part", self.layer.bias.detach()[:7])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.layer(x)) + self.part.sum()
        return result


class ChangedByItsLoading(nn.Linear):
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.weight.data.fill_(5.0)


def moved(fetched: Fetched, card: Card | None) -> tuple[Moved, Late]:
    side = Late()
    return upload.move(joined(fetched), fetched, side, CPU, PinnedSlots(side, 3, 1 << 16, 2), card), side


def lies_in(tensor: torch.Tensor, memory: torch.Tensor) -> bool:
    return memory.data_ptr() <= tensor.data_ptr() < memory.data_ptr() + memory.nbytes


def test_the_second_job_uploads_no_weights(make: Make, registry: Path) -> None:
    model = Wide().eval()
    fetched = fetch(put(model, "wide"))
    (first, _), (second, side) = moved(fetched, make()), moved(fetched, make())
    x = torch.randn(3, 1000)
    for each in (first, second):
        assert_alike(each.model, joined(fetched))
        assert torch.equal(each.model(x), model(x))
        (lease,) = each.leases
        assert lies_in(tensors(each.model)["layer.weight"], lease.memory)
    assert second.nbytes == sum(memory.nbytes for memory in side.memory) < 0.01 * fetched.description.nbytes
    assert second.leases[0].owner == first.leases[0].owner


def test_what_a_model_may_write_to_is_its_own(make: Make, registry: Path) -> None:
    fetched = fetch(put(Wide().train(), "wide"))
    (first, _), (second, _) = moved(fetched, make()), moved(fetched, make())
    first.model(torch.randn(8, 1000))
    assert tensors(first.model)["norm.num_batches_tracked"] == 1
    assert tensors(second.model)["norm.num_batches_tracked"] == 0
    tensors(first.model)["part"].fill_(9.0)  # a buffer over a parameter: that, too
    assert tensors(first.model)["layer.bias"][0] == 9.0
    assert tensors(second.model)["layer.bias"][0] != 9.0
    assert first.leases[0].trouble() == second.leases[0].trouble() == ""


@pytest.mark.parametrize("model", [nn.Linear(10, 10), nn.LSTM(600, 300), ChangedByItsLoading(1000, 1000)], ids=repr)
def test_some_models_are_not_shared(model: nn.Module, make: Make, registry: Path) -> None:
    fetched = fetch(put(model.eval(), "model"))
    for _ in range(2):
        found, _ = moved(fetched, make())
        assert_alike(found.model, joined(fetched))
        assert not found.leases


def test_without_an_owner_it_is_uploaded_and_told_once(
    make: Make, registry: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload._told.clear()
    fetched = fetch(put(Wide().eval(), "wide"))
    card = make()
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuIpcOpenMemHandle_v2=400")
    with caplog.at_level(logging.WARNING, "zcinfer"):
        for _ in range(2):
            found, side = moved(fetched, card)
            assert_alike(found.model, joined(fetched))
            assert not found.leases
            assert found.nbytes == sum(memory.nbytes for memory in side.memory) > 4_000_000
    assert caplog.text.count("weights on cpu are this process's own, and not shared with other jobs: cuIpcOpen") == 1


def test_another_models_weights_are_others(make: Make, registry: Path) -> None:
    one, other = Wide().eval(), Wide().eval()
    nn.init.ones_(other.layer.weight)
    card = make()
    found = [moved(fetch(put(model, name)), card)[0] for model, name in ((one, "one"), (other, "other"))]
    assert tensors(found[1].model)["layer.weight"].eq(1).all()
    assert torch.equal(tensors(found[0].model)["layer.weight"], one.layer.weight)


@pytest.fixture
def residents(make: Make, registry: Path, monkeypatch: pytest.MonkeyPatch) -> Residents:
    """Those of a job whose device "meta" is a card that is none."""
    card = make()
    monkeypatch.setattr(
        loading, "to_device", lambda model, fetched, device, share: moved(fetched, card if share else None)[0]
    )
    return Residents(loading.Resident, 10)


def owner_of(residents: Residents) -> int:
    ((resident,),) = residents._free.values()
    assert isinstance(resident, loading.Resident)
    return resident._leases[0].owner


def kill(owner: int) -> None:
    os.kill(owner, signal.SIGKILL)
    wait_until(lambda: not living([psutil.Process(owner)]) if psutil.pid_exists(owner) else True)


def test_a_model_is_used_again(residents: Residents, registry: Path) -> None:
    ref = put(Wide().eval(), "wide")
    with residents.lend(ref, "meta", "refuse") as first:
        pass
    with residents.lend(ref, "meta", "refuse") as second:
        assert second is first


def test_what_a_user_loads_is_the_users_own(residents: Residents, registry: Path) -> None:
    model = Wide().eval()
    ref = put(model, "wide")
    with residents.lend(ref, "meta", "refuse"):
        loaded = loading.load_ref(ref, "meta")
        tensors(loaded)["layer.weight"].data.zero_()
    assert owner_of(residents)  # shared, and what it computed counts


def test_a_block_during_which_the_owner_died_does_not_count(residents: Residents, registry: Path) -> None:
    model = Wide().eval()
    ref = put(model, "wide")
    with residents.lend(ref, "meta", "refuse"):
        pass
    owner = owner_of(residents)
    with (
        pytest.raises(DeviceLost, match=r"weights of wide@1 on meta, .* \(the process that owned it is gone\).* again"),
        residents.lend(ref, "meta", "refuse"),
    ):
        kill(owner)
    with residents.lend(ref, "meta", "refuse") as again:
        assert torch.equal(tensors(again)["layer.weight"], model.layer.weight)
    assert owner_of(residents) != owner


def test_an_owner_that_died_between_blocks_is_replaced_in_silence(residents: Residents, registry: Path) -> None:
    ref = put(Wide().eval(), "wide")
    with residents.lend(ref, "meta", "refuse") as first:
        pass
    owner = owner_of(residents)
    kill(owner)
    with residents.lend(ref, "meta", "refuse") as second:
        assert second is not first
    assert owner_of(residents) != owner


def test_a_block_during_which_somebody_wrote_to_the_weights_does_not_count(
    residents: Residents, make: Make, registry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    upload._told.clear()
    model = Wide().eval()
    ref = put(model, "wide")
    other, _ = moved(fetch(ref), make())
    with (
        pytest.raises(DeviceLost, match="somebody wrote to it"),
        residents.lend(ref, "meta", "refuse"),
    ):
        tensors(other.model)["layer.weight"].data[3, 4] += 1
    with caplog.at_level(logging.WARNING, "zcinfer"), residents.lend(ref, "meta", "refuse") as again:
        assert torch.equal(tensors(again)["layer.weight"], model.layer.weight)
    assert "a model in some job writes to its weights" in caplog.text


# What the block of the next test finds, by its name: a worker is sent names alone
_scene: dict[str, Any] = {}


def block() -> float:
    ran, doomed = _scene["ran"], _scene["doomed"]
    with _scene["residents"].lend(_scene["ref"], "meta", "refuse") as lent:
        ran.append(1)
        result = float(tensors(lent)["layer.weight"].detach().sum())
        if doomed:
            kill(doomed.pop())
    return result


@pytest.mark.slow
def test_dask_computes_such_a_block_again(residents: Residents, registry: Path) -> None:
    model = Wide().eval()
    ref = put(model, "wide")
    with residents.lend(ref, "meta", "refuse"):
        pass
    _scene.update(residents=residents, ref=ref, doomed=[owner_of(residents)], ran=[])
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        assert client.submit(block, pure=False).result(30) == float(model.layer.weight.detach().sum())
    assert len(_scene["ran"]) == 2
    _scene.clear()


OTHER_JOB = """
import sys
import torch
from zcinfer.device_sharing import Card
from pathlib import Path
from test_shared_weights import fetch, moved, tensors
from zcinfer.store import FileStore
found, side = moved(FileStore(sys.argv[1]).fetch(sys.argv[2]), Card(torch.device("cpu"), 0.5, Path(sys.argv[3])))
print(found.leases[0].owner, found.nbytes, float(tensors(found.model)["layer.weight"].detach().sum()))
"""


@pytest.mark.slow
def test_another_process_shares_them(make: Make, place: Path, registry: Path) -> None:
    model = Wide().eval()
    ref = put(model, "wide")
    first, _ = moved(fetch(ref), make())
    done = subprocess.run(
        [sys.executable, "-c", OTHER_JOB, str(registry), ref.digest, str(place)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    owner, nbytes, total = done.stdout.split()
    assert int(owner) == first.leases[0].owner
    assert int(nbytes) < 0.01 * ref.nbytes
    assert float(total) == float(model.layer.weight.detach().sum())
