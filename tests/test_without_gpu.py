"""The tests for a GPU, where there is none, and where there is hardly anything: they are collected, and say why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# All that a machine with a GPU need not have
ABSENT = ("dask", "distributed", "ray", "zarr", "pandas", "psutil", "click", "tqdm", "xarray", "fsspec", "yaml")


@pytest.mark.slow
@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_tests_for_a_gpu_skip_with_the_reason(tmp_path: Path) -> None:
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" in done.stdout
    assert "passed" not in done.stdout
    assert "is a build without CUDA" in done.stdout or "CUDA cannot be used" in done.stdout


PREDICTS = """
import sys
sys.modules.update(dict.fromkeys({absent}))
import numpy as np, torch
import zcinfer as zc
from zcinfer import pipeline

pipeline.suits = lambda device: True
zc.connect("file:{directory}")
model = torch.nn.Linear(4, 2).eval()
zc.put(model, "linear")
x = np.ones((10_000, 4), "f4")
with torch.inference_mode():
    assert np.allclose(zc.predict("linear", x, batch_size=64), model(torch.from_numpy(x)).numpy())
print("done")
"""


def test_a_machine_without_dask_and_ray_puts_and_predicts(tmp_path: Path) -> None:
    program = PREDICTS.format(absent=ABSENT, directory=tmp_path / "registry")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
