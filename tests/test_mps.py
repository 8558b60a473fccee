"""Whether MPS runs: a daemon that listens, one that has ended, and none."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from zcinfer.mps import mps


@pytest.fixture
def pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # paths of sockets are short
    return Path("pipes")


def told(pipes: Path) -> str:
    return mps({"CUDA_MPS_PIPE_DIRECTORY": str(pipes)})


def test_a_daemon_that_listens_and_then_ends(pipes: Path) -> None:
    pipes.mkdir()
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(pipes / "control"))
        daemon.listen()
        assert told(pipes) == "MPS runs (pipes)"
    assert told(pipes) == "MPS does not run: nobody listens at pipes/control, which an ended daemon has left"


def test_no_daemon(pipes: Path) -> None:
    assert told(pipes) == "MPS does not run: there is no pipes/control"
    pipes.mkdir()
    (pipes / "control").touch()
    assert told(pipes) == "MPS does not run: pipes/control is no socket"


def test_a_path_that_is_no_directory(pipes: Path) -> None:
    pipes.touch()
    assert told(pipes) == "whether MPS runs is not known: pipes/control: Not a directory"


@pytest.mark.skipif(os.path.exists("/tmp/nvidia-mps"), reason="for machines without MPS")
def test_the_directory_that_cuda_looks_in() -> None:
    for environment in ({}, {"CUDA_MPS_PIPE_DIRECTORY": ""}):
        assert mps(environment) == "MPS does not run: there is no /tmp/nvidia-mps/control"
