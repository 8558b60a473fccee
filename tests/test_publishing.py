"""Publishing: shown while it lasts, whole or not at all."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distributed import Client
from torch import nn

import zcinfer as zc
from zcinfer import archive, catalog, publishing

BIG = """
import sys, torch, zcinfer as zc
zc.connect("file")
model = torch.nn.Sequential(*(torch.nn.Linear(2000, 2000, bias=False) for _ in range(40))).eval()
print("putting", flush=True)
zc.put(model, "big", progress=True)
print("done", flush=True)
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_quick_put_shows_nothing(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    zc.put(nn.Linear(500, 500).eval(), "model")
    assert not re.search(r"\d+%", terminal.getvalue())


def test_bytes_are_counted_twice_over(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(publishing, "bytes_bar", lambda label, total, show: _Counting(counted, total))
    zc.put(nn.Linear(1000, 1000).eval(), "model")
    total, *pieces = counted
    # Read once and written once, but for padding.
    assert total == 2 * 4 * 1001 * 1000
    assert total <= sum(pieces) < total + 10_000


class _Counting:
    def __init__(self, counted: list[int], total: int):
        self.counted = counted
        counted.append(total)

    def __enter__(self) -> object:
        return self.counted.append

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("at", range(1, 7))
def test_an_interrupted_put_leaves_nothing(registry: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_WRITE", 1 << 20)
    left = at

    def interrupt(_: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    class Bar(_Counting):
        def __enter__(self) -> object:
            return interrupt

    monkeypatch.setattr(publishing, "bytes_bar", lambda label, total, show: Bar([], total))
    with pytest.raises(KeyboardInterrupt):
        zc.put(nn.Linear(1000, 1000).eval(), "model")
    assert left == 0
    assert zc.models().empty
    files = [path for path in registry.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    assert not files


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_killed_put_leaves_nothing_to_be_seen(registry: Path, number: int) -> None:
    environment = os.environ | {"DASK_ZCINFER__REGISTRY": str(registry)}
    with subprocess.Popen(
        [sys.executable, "-c", BIG], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "putting\n"
        while not list(registry.glob(".tmp-*/archive/*")):  # until it writes
            assert process.poll() is None
        process.send_signal(number)
        assert process.stdout.read() == ""
    assert zc.models().empty
    zc.put(nn.Linear(2, 2).eval(), "small")  # sweeps what a killed one has left
    assert not list(registry.glob(".tmp-*"))
    assert [path.name for path in (registry / "archives").iterdir()] == list(zc.models()["digest"])


def test_a_client_that_found_no_scheduler_is_none(registry: Path, tmp_path: Path) -> None:
    from distributed.client import default_client

    with pytest.raises(ValueError, match="missing port") as refused:  # which keeps the client, as a traceback does
        Client("nowhere")
    client = default_client()
    try:
        assert client.status == "connecting"
        assert catalog.dask_client() is None
        zc.put(nn.Linear(2, 2).eval(), "model")
        np.save(tmp_path / "x.npy", np.ones((8, 2), np.float32))
        assert zc.run("model", tmp_path / "x.npy", tmp_path / "y.zarr", progress=False).computed
    finally:
        client.close()
    assert refused.tb is not None
