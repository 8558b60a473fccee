"""Classes of modules that no other process can import: made by code, read from a path, fetched with a model."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import zcinfer as zc
from zcinfer import bytecode

LAYERS = """
import enum
import logging
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")
log = logging.getLogger(__name__)
FACTOR = torch.tensor([2.0])
TABLE = {"shift": 1}


class Kind(enum.Enum):
    ADD = 1


@dataclass
class Settings:
    shift: int = 0


def shifted(x: T) -> T:
    log.debug("a call")
    return x * FACTOR + TABLE["shift"]


class Layer(nn.Linear):
    settings = Settings(3)

    def forward(self, x):
        return shifted(super().forward(x)) + self.settings.shift + Kind.ADD.value
"""
MODEL = """
import torch
from torch import nn

from zcinfer_test_layers import Kind, Layer, shifted


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(4, 4), Layer(4, 4)])
        self.kind = Kind.ADD

    def forward(self, x):
        for layer in self.layers:
            x = shifted(layer(x))
        return x + len(Model.__mro__) if self.kind is Kind.ADD else x
"""
READ = """
import sys, torch, zcinfer as zc
zc.connect("file:" + sys.argv[1])
model = zc.load("model")
torch.save(model(torch.linspace(-1, 1, 8).view(2, 4)), sys.argv[2])
print(zc.put(model, "again").digest)
"""


def of_a_path(path: Path, name: str, source: str) -> ModuleType:
    """A module of a file in a directory where nobody looks, as the way to import a path has it."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made(tmp_path: Path) -> Iterator[ModuleType]:
    layers = of_a_path(tmp_path / "layers.py", "zcinfer_test_layers", LAYERS)
    layers.back = of_a_path(tmp_path / "model.py", "zcinfer_test_model", MODEL)  # type: ignore[attr-defined]
    yield layers.back
    del sys.modules["zcinfer_test_layers"], sys.modules["zcinfer_test_model"]


def elsewhere(registry: Path, tmp_path: Path) -> tuple[Any, str]:
    """What a process with other modules computes with "model", and the digest of what it has."""
    found = tmp_path / "found.pt"
    done = subprocess.run(
        [sys.executable, "-c", READ, registry, found], capture_output=True, text=True, timeout=100, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return torch.load(found), done.stdout.split()[-1]


X = torch.linspace(-1, 1, 8).view(2, 4)


def test_modules_read_from_a_path(registry: Path, tmp_path: Path, made: ModuleType) -> None:
    model = made.Model().eval()
    ref = zc.put(model, "model")
    assert zc.put(model, "model") == ref
    here = zc.load("model")
    assert type(here) is made.Model
    assert torch.equal(here(X), model(X))
    output, digest = elsewhere(registry, tmp_path)
    assert torch.equal(output, model(X))
    assert digest == ref.digest


def test_what_such_a_module_does_belongs_to_the_model(registry: Path, tmp_path: Path, made: ModuleType) -> None:
    torch.manual_seed(0)
    first = zc.put(made.Model(), "model")
    of_a_path(tmp_path / "layers.py", "zcinfer_test_layers", LAYERS.replace("x * FACTOR", "x / FACTOR"))
    changed = of_a_path(tmp_path / "model.py", "zcinfer_test_model", MODEL)
    torch.manual_seed(0)
    model = changed.Model()
    assert zc.put(model, "model").digest != first.digest
    assert torch.equal(elsewhere(registry, tmp_path)[0], model(X))


def test_what_cannot_travel_goes_by_name_and_is_told(
    registry: Path, tmp_path: Path, made: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    layers = sys.modules["zcinfer_test_layers"]
    layers.log = threading.Lock()  # type: ignore[attr-defined]
    model = made.Model()
    zc.put(model, "model")
    assert "Make the module importable wherever it is loaded" in caplog.text
    layers.log = logging.getLogger()  # type: ignore[attr-defined]
    assert torch.equal(zc.load("model")(X), model(X))


def test_another_module_of_that_name_is_not_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_a_path(tmp_path / "elsewhere.py", "zcinfer_test_namesake", LAYERS)
    try:
        (tmp_path / "path" / "zcinfer_test_namesake").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / "path")
        assert not bytecode.is_found("zcinfer_test_namesake")
    finally:
        del sys.modules["zcinfer_test_namesake"]


def test_a_module_that_code_puts_into_a_package(registry: Path, tmp_path: Path) -> None:
    name = "torch.nn.zcinfer_test_template"
    module = ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(LAYERS, "template.py", "exec"), vars(module))
        model = nn.Sequential(module.Layer(4, 4))
        zc.put(model, "model")
        assert torch.equal(elsewhere(registry, tmp_path)[0], model(X))
    finally:
        del sys.modules[name]


def test_code_that_transformers_fetches_with_a_model(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "configuration_x.py": """
from transformers import PretrainedConfig

class XConfig(PretrainedConfig):
    model_type = "zcinfer-test"
""",
        "layers_x.py": LAYERS,
        "modeling_x.py": """
from transformers import PreTrainedModel
from .configuration_x import XConfig
from .layers_x import Layer

class XModel(PreTrainedModel):
    config_class = XConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = Layer(4, 4)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, x):
        return self.layer(x)
""",
        "config.json": json.dumps(
            {
                "model_type": "zcinfer-test",
                "auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"},
            }
        ),
    }
    source = tmp_path / "source"
    source.mkdir()
    for file, text in files.items():
        (source / file).write_text(text)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = transformers.AutoModel.from_config(config, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    ref = zc.put(model, "model")
    output, digest = elsewhere(registry, tmp_path)
    assert torch.equal(output, model(X))
    assert digest == ref.digest


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("torch", True),
        ("torch.nn.functional", True),
        ("torch._C._nn", True),  # made by its parent
        ("builtins", True),
        ("zcinfer.parts", True),
        (__name__, True),
        ("__main__", False),
        ("__mp_main__", False),
        ("transformers_modules", False),
        ("transformers_modules.name.version.modeling", False),
        ("zcinfer.no_such_module", False),
        ("no_such_package", False),
        ("no_such_package.module", False),
    ],
)
def test_modules_that_other_processes_find(module: str, found: bool) -> None:
    assert bytecode.is_found(module) is found
