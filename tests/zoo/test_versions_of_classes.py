"""Classes that travel by value and are changed between two puts, or after one: models do what they did when put.

Programs are made by `exec`, as scripts and notebooks are: their classes and functions are of `__main__`. Where the
program is forgotten (`gc`), all is as in another process.
"""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zcinfer import catalog, loading
from zcinfer.parts import join, join_fake, split
from zcinfer.publishing import put
from zoo.compare import buffer_of, round_trip

SCRIPT = """
import torch
from torch import nn

SCALE = 2

class Net(nn.Module):
    offset = torch.ones(2)
    known = {}

    def forward(self, x):
        return x * SCALE + self.offset
"""

X = torch.ones(2)


def run(source: str) -> dict[str, Any]:
    program: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, "script.py", "exec"), program)
    return program


class Published:
    """A model as it was, to be had as often as one likes."""

    def __init__(self, model: nn.Module):
        self.parts = split(model)
        self._buffer = buffer_of(self.parts)

    def load(self) -> Any:
        return join(self.parts.skeleton, self.parts.description, self._buffer.copy())


def publish(source: str, name: str, elsewhere: bool) -> tuple[dict[str, Any], Any, Published]:
    """A script, the model that it makes by that name, and what is published of it; elsewhere these are gone."""
    program = run(source)
    model = program[name]()
    published = Published(model)
    if elsewhere:
        program.clear()
        model = None
        gc.collect()
    return program, model, published


def change_method(program: dict[str, Any]) -> None:
    exec("Net.forward = lambda self, x: x * 7", program)


def change_attribute(program: dict[str, Any]) -> None:
    program["Net"].offset = torch.tensor([5.0, 5.0])


def change_attribute_in_place(program: dict[str, Any]) -> None:
    program["Net"].offset += 4


def change_container(program: dict[str, Any]) -> None:
    exec("Net.known['a'] = 3; Net.forward = lambda self, x: x * len(self.known) * 7", program)


def change_global(program: dict[str, Any]) -> None:
    program["SCALE"] = 6


CHANGES = [change_method, change_attribute, change_attribute_in_place, change_container, change_global]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_two_versions_of_a_class_do_not_become_one(change: Callable[[dict[str, Any]], None], elsewhere: bool) -> None:
    program = run(SCRIPT)
    model = program["Net"]()
    first = Published(model)
    change(program)
    second = Published(model)
    changed = model(X)
    assert not torch.equal(changed, X * 3)
    if elsewhere:
        program.clear()
        del model
        gc.collect()
    old, new, old_again = first.load(), second.load(), first.load()
    assert torch.equal(old(X), X * 3)
    assert torch.equal(old_again(X), X * 3)
    assert torch.equal(new(X), changed)
    assert type(old) is type(old_again) is not type(new)
    for copy, published in ((old, first), (new, second)):
        assert split(copy).description.digest == published.parts.description.digest


@pytest.mark.parametrize("change", [*CHANGES, lambda program: None])
def test_a_load_leaves_the_classes_of_the_program_alone(change: Callable[[dict[str, Any]], None]) -> None:
    program = run(SCRIPT)
    cls = program["Net"]
    published = Published(cls())
    change(program)
    before, content = dict(vars(cls)), cls.offset.clone()
    published.load()
    assert vars(cls).keys() == before.keys()
    assert all(vars(cls)[name] is before[name] for name in before)
    assert torch.equal(cls.offset, content)


def test_the_program_that_put_a_model_gets_its_own_class_back() -> None:
    program = run(SCRIPT)
    model, other = program["Net"](), program["Net"]()
    other.weight = nn.Parameter(X)
    assert type(round_trip(model)) is type(round_trip(other)) is program["Net"]
    change_global(program)
    assert type(round_trip(model)) is program["Net"]


def test_two_models_of_one_class_are_of_one_class_elsewhere() -> None:
    program = run(SCRIPT)
    model, other = program["Net"](), program["Net"]()
    other.weight = nn.Parameter(X)
    both = Published(model), Published(other)
    program.clear()
    del model, other
    gc.collect()
    copy, other_copy = (published.load() for published in both)
    assert type(copy) is type(other_copy)
    assert type(round_trip(copy)) is type(copy)


def test_a_class_that_was_loaded_and_put_again_is_the_same_class() -> None:
    program = run(SCRIPT)
    published = Published(program["Net"]())
    program.clear()
    gc.collect()
    copy = published.load()
    again = Published(copy)
    assert type(again.load()) is type(copy)
    del copy
    gc.collect()
    assert type(again.load()) is type(published.load())


def test_a_model_of_a_loaded_class_and_of_its_newer_version_keeps_both() -> None:
    program = run(SCRIPT)
    first = Published(program["Net"]())
    change_method(program)
    both = nn.Sequential(first.load(), program["Net"]())
    assert torch.equal(round_trip(both)(X), X * 21)
    published = Published(both)
    del both
    program.clear()
    gc.collect()
    assert torch.equal(published.load()(X), X * 21)


# Hooks that tell the class's method something by what both use.
BY_A_DICTIONARY = """
import torch
from torch import nn

seen = {}

def remember(module, inputs):
    seen["x"] = inputs[0] * 2

class Net(nn.Module):
    def forward(self, x):
        return seen.pop("x")

def build():
    model = Net()
    model.register_forward_pre_hook(remember)
    return model
"""
BY_A_VARIABLE = """
import torch
from torch import nn

seen = 0

def remember(module, inputs):
    global seen
    seen = seen + 2

class Net(nn.Module):
    def forward(self, x):
        return x * seen

def build():
    model = Net()
    model.register_forward_pre_hook(remember)
    return model
"""
BY_A_TENSOR = """
import torch
from torch import nn

class Net(nn.Module):
    seen = torch.zeros(2)

    def forward(self, x):
        self.mine.fill_(2)
        return x * self.seen

def build():
    model = Net()
    model.mine = Net.seen.view(2)
    return model
"""
BY_THE_MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, x):
        return x * model.factor

def build():
    global model
    model = Net()
    model.factor = 2
    return model
"""


BY_A_FUNCTION = """
import torch
from torch import nn

class Net(nn.Module):
    @staticmethod
    def twice(x):
        return x * 2

    def forward(self, x):
        return self.mine(x) if self.mine is self.twice else x

def build():
    model = Net()
    model.mine = Net.twice
    return model
"""


@pytest.mark.parametrize("source", [BY_A_FUNCTION, BY_A_DICTIONARY, BY_A_VARIABLE, BY_A_TENSOR, BY_THE_MODEL])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_a_model_and_its_class_have_in_common_stays_so(source: str, elsewhere: bool) -> None:
    _, model, published = publish(source, "build", elsewhere)
    kept = [published.load()]
    assert split(kept[0]).description.digest == published.parts.description.digest
    if not elsewhere:
        model.factor = 9
    assert torch.equal(kept[0](X), X * 2)
    kept.append(published.load())
    assert torch.equal(kept[1](X), X * 2)
    assert type(kept[0]) is type(kept[1])


HOOKED = """
import torch
from torch import nn

class Base(nn.Module):
    def twice(self, module, inputs, output):
        return output * 2

class Net(Base):
    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()
        self.layer.register_forward_hook(self.twice)

    def forward(self, x):
        return self.layer(x)
"""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_method_of_the_model_is_that_of_the_class_of_the_copy(elsewhere: bool) -> None:
    program, _, published = publish(HOOKED, "Net", elsewhere)
    copy = published.load()
    (hook,) = copy.layer._forward_hooks.values()
    assert hook.__self__ is copy
    assert hook.__func__ is type(copy).twice
    assert torch.equal(copy(X), X * 2)
    assert elsewhere or type(copy) is program["Net"]
    assert split(copy).description.digest == published.parts.description.digest


def test_a_method_that_a_script_has_put_into_a_class_of_a_module_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    program = run("def extra_repr(self): return 'of the script'")
    monkeypatch.setattr(nn.Identity, "extra_repr", program["extra_repr"])
    model = nn.Identity()
    model.method = model.extra_repr
    published = Published(model)
    monkeypatch.undo()
    assert published.load().method() == "of the script"


def test_a_method_of_an_instance_that_its_class_holds() -> None:
    program = run(SCRIPT)
    model = program["Net"]()
    program["Net"].known.update(model=model, method=model.forward)
    published = Published(model)
    for _ in range(2):
        copy = published.load()
        assert copy.known["model"] is copy
        assert copy.known["method"].__self__ is copy
        assert torch.equal(copy.known["method"](X), X * 3)
        program.clear()  # from the second time on as in another process
        model = None
        gc.collect()


def test_a_model_without_weights_has_classes_of_its_own() -> None:
    """Else tensors that classes hold would be fake from then on."""
    program = run(SCRIPT)
    published = Published(program["Net"]())
    change_global(program)
    copy = published.load()
    with FakeTensorMode():
        fake = join_fake(published.parts.skeleton, published.parts.description)
        assert fake(torch.ones(2)).shape == (2,)
    assert torch.equal(copy(X), X * 3)
    assert torch.equal(program["Net"]()(X), X * 7)


READER = """
import pickle, sys
import torch
from zcinfer.loading import load_ref
first, second = pickle.load(sys.stdin.buffer)
old, new = load_ref(first), load_ref(second)
print([model(torch.ones(2)).tolist() for model in (old, new, load_ref(first))])
"""


@pytest.mark.slow
def test_another_process_has_both_versions(tmp_path: Path) -> None:
    program = run(SCRIPT)
    model = program["Net"]()
    with dask.config.set({"zcinfer.registry": str(tmp_path / "registry")}):
        catalog.connect("file")
        refs = [put(model, "net")]
        change_method(program)
        refs.append(put(model, "net"))
        reader = [sys.executable, "-c", READER]
        found = subprocess.run(reader, input=pickle.dumps(refs), stdout=subprocess.PIPE, timeout=60, check=True).stdout
        catalog.disconnect()
    loading.residents.clear()
    assert found.decode().strip() == "[[3.0, 3.0], [7.0, 7.0], [3.0, 3.0]]"
