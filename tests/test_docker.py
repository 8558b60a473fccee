"""The files of docker/: what they run is there, and what they name is the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import zcinfer
from zcinfer.cli import main

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker" / name).read_text())
    return found


@pytest.mark.parametrize("service", ["head", "worker"])
def test_the_commands_of_the_services_are_understood(service: str) -> None:
    verb, *arguments = read("compose.yaml")["services"][service]["command"]
    command = main.commands[verb]
    given = command.make_context(verb, list(arguments)).params
    assert given["head"] == (service == "head")
    assert given["join"] == (None if given["head"] else f"head:{given['port']}")


def test_workers_with_gpus_join_as_the_others_do() -> None:
    *command, gpus, which = read("compose.gpu.yaml")["services"]["worker"]["command"]
    assert command == read("compose.yaml")["services"]["worker"]["command"]
    assert (gpus, which) == ("--gpus", "all")


def test_the_checks_of_health_are_programs_of_python() -> None:
    for service in read("compose.yaml")["services"].values():
        kind, python, option, source = service["healthcheck"]["test"]
        assert (kind, python, option) == ("CMD", "python3", "-c")
        compile(source, "healthcheck", "exec")


def test_images_are_named_after_the_version() -> None:
    assert read("compose.yaml")["x-node"]["image"] == f"zcinfer:{zcinfer.__version__}"
    assert read("compose.gpu.yaml")["x-cuda"]["image"] == f"zcinfer:{zcinfer.__version__}-cuda"


def test_the_override_changes_services_that_are_there() -> None:
    assert read("compose.gpu.yaml")["services"].keys() == read("compose.yaml")["services"].keys()


def test_torch_is_the_one_that_is_pinned() -> None:
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert f"ARG TORCH={pin}\n" in (ROOT / "docker/Dockerfile").read_text()


def test_what_the_image_copies_is_let_in() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    lines = (ROOT / "docker/Dockerfile").read_text().splitlines()
    copies = [line.split() for line in lines if line.startswith("COPY ") and "--from" not in line]
    copied = {name for line in copies for name in line[1:-1]}
    assert copied == let_in
