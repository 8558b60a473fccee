"""The README is run: its program as a script of its own, its commands held against the program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.ray
def test_the_program_runs_as_it_stands(tmp_path: Path) -> None:
    (program,) = blocks("python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 15
    (tmp_path / "first.py").write_text(program)
    environment = {**os.environ, "DASK_ZCINFER__REGISTRY": str(tmp_path / "registry")}
    done = subprocess.run(
        [sys.executable, "first.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "dask.array<predict, shape=(1000000, 1), dtype=float32" in done.stdout
    assert (tmp_path / "out.zarr").is_dir()


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)", "".join(blocks("sh")))) <= targets


def test_commands_and_options_exist() -> None:
    from zcinfer.cli import main

    for line in "".join(blocks("sh")).splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["zcinfer"]:
            command = main.commands[words[1]]
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known, line


def test_links_lead_somewhere() -> None:
    for text in (README, *(path.read_text() for path in (ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (ROOT / target).exists() or (ROOT / "docs" / target).exists(), target
