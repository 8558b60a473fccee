"""What no pickle carries is carried whole; what no reader can share is said; NumPy arrays are shared."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zcinfer as zc
from zcinfer import loading
from zcinfer.memory import process_memory
from zcinfer.parts import split
from zcinfer.programs import program_bytes, program_digest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 80), nn.ReLU(), nn.Linear(80, 20)).eval()


def x() -> torch.Tensor:
    return torch.linspace(-1, 1, 120).reshape(3, 40)


def digest_of(program: Any) -> bytes:
    return program_digest(program, program_bytes(program))


def scripted() -> Any:
    return torch.jit.script(net())


def traced() -> Any:
    return torch.jit.trace(net(), x())


class Holder(nn.Module):
    """A module with TorchScript in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = scripted()
        self.outer = nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.outer(self.inner(x))
        return result


@pytest.mark.parametrize("make", [scripted, traced, Holder])
def test_torchscript_comes_back(registry: Path, make: Any) -> None:
    torch.manual_seed(1)
    model = make().eval()
    expected = model(x())
    zc.put(model, "script")
    assert torch.equal(zc.load("script")(x()), expected)
    assert np.array_equal(zc.predict("script", x().numpy()), expected.detach().numpy())


def test_an_exported_program_comes_back(registry: Path) -> None:
    program = torch.export.export(net(), (x(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    zc.put(program, "exported")
    with torch.no_grad():
        expected = net()(x())
        assert torch.equal(zc.load("exported")(x()), expected)
    assert np.array_equal(zc.predict("exported", x().numpy()), expected.numpy())


def test_what_each_process_holds_is_told(registry: Path, caplog: pytest.LogCaptureFixture) -> None:
    ref = zc.put(Holder().eval(), "held")
    row = zc.models().iloc[0]
    assert row["why"] == "Holder.inner (a RecursiveScriptModule)"
    assert row["private"] > 4 * (40 * 80 + 80 * 20)
    assert row["shared"] == ref.nbytes > row["private"]  # the program's bytes, and the other tensors
    assert "held: " in caplog.text
    assert "Holder.inner (a RecursiveScriptModule)" in caplog.text


DIGESTS = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from torch import nn
from zcinfer.programs import program_bytes, program_digest
for _ in range(int(sys.argv[1])):
    torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(40, 80), nn.ReLU(), nn.Linear(80, 20)).eval()
for program in torch.jit.script(model), torch.export.export(model, (torch.linspace(-1, 1, 120).reshape(3, 40),)):
    print(program_digest(program, program_bytes(program)).hex())
"""


@pytest.mark.slow
def test_processes_agree_on_digests() -> None:
    found = {
        subprocess.run([sys.executable, "-c", DIGESTS, others], stdout=subprocess.PIPE, check=True).stdout
        for others in ("0", "3")
    }
    assert len(found) == 1
    assert digest_of(scripted()).hex().encode() in found.pop()


def test_what_was_saved_and_loaded_is_the_same_program() -> None:
    file = io.BytesIO()
    torch.jit.save(scripted(), file)
    file.seek(0)
    assert digest_of(torch.jit.load(file)) == digest_of(scripted())


def test_weights_code_and_constants_make_another_program() -> None:
    other = net()
    with torch.no_grad():
        other[0].bias[3] += 1  # type: ignore[index, operator]
    scaled = nn.Sequential(*net(), nn.LeakyReLU(0.1)), nn.Sequential(*net(), nn.LeakyReLU(0.2))
    digests = [digest_of(torch.jit.script(m.eval())) for m in (net(), other, *scaled, nn.Sequential(*net()[:2]))]
    assert len(set(digests)) == len(digests)


def test_a_retrained_exported_program_is_another(registry: Path) -> None:
    retrained = net()
    with torch.no_grad():
        retrained[0].weight += 1  # type: ignore[index, operator]
    versions = [zc.put(torch.export.export(model, (x(),)), "exported") for model in (net(), retrained)]
    assert [ref.version for ref in versions] == [1, 2]
    with torch.no_grad():
        assert torch.equal(zc.load("exported")(x()), retrained(x()))


class Two(nn.Module):
    """Two submodules of one class, with other constants."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x), self.second(x)], 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: nn.LeakyReLU(n / 10),
        lambda n: nn.MaxPool1d(n),
        lambda n: nn.Dropout(n / 10),
        lambda n: nn.ELU(float(n)),
    ],
    ids=["LeakyReLU", "MaxPool1d", "Dropout", "ELU"],
)
def test_swapped_submodules_make_another_program(make: Any) -> None:
    one, other = (torch.jit.script(Two(make(a), make(b)).eval()) for a, b in ((1, 5), (5, 1)))
    assert digest_of(one) != digest_of(other)
    assert digest_of(one) == digest_of(torch.jit.script(Two(make(1), make(5)).eval()))


def test_a_program_tied_to_the_rest_is_refused() -> None:
    model = nn.Module()
    model.head = nn.Linear(3, 3)
    model.script = torch.jit.script(model.head)
    with pytest.raises(zc.errors.SplitError, match=r"Module\.script .*shares tensors with the rest"):
        split(model)


def test_an_attribute_that_torch_would_lose_is_refused() -> None:
    script = scripted()
    script.note = "hi"
    with pytest.raises(zc.errors.SplitError, match=r"has the attribute .note"):
        split(script)


@pytest.mark.parametrize("check_guards", [True, False])
def test_the_module_of_an_exported_program_is_refused_with_the_remedy(check_guards: bool) -> None:
    module = torch.export.export(net(), (x(),)).module(check_guards=check_guards)
    with pytest.raises(zc.errors.SplitError, match="publish the program itself"):
        split(module)


def test_a_program_goes_out_to_an_archive_and_comes_back(registry: Path, tmp_path: Path) -> None:
    program = torch.export.export(net(), (x(),))
    ref = zc.put(program, "exported")
    zc.save("exported", tmp_path / "by-name")
    zc.save(program, tmp_path / "itself")
    for place in ("by-name", "itself"):
        assert zc.put(tmp_path / place, "again").digest == ref.digest
    with torch.no_grad():
        assert torch.equal(zc.load("again")(x()), net()(x()))


# NumPy arrays


class Arrays(nn.Module):
    """Arrays of several kinds, and one that is in two places."""

    def __init__(self, **arrays: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        for name, array in arrays.items():
            setattr(self, name, array)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(self.table.sum())


ARRAYS = {
    "float": np.linspace(0, 1, 5000),
    "matrix": np.arange(60_000, dtype=np.int16).reshape(200, 300),
    "fortran": np.asfortranarray(np.arange(60_000.0).reshape(200, 300)),
    "text": np.array(["abc", "de"] * 2000),
    "record": np.zeros(1000, [("a", "i4"), ("b", "f8")]),
    "complex": np.full((30, 40, 5), 1 + 2j),
    "big-endian": np.arange(5000, dtype=">f4"),
    "dates": np.arange(5000).astype("M8[s]"),
    "unsigned": np.arange(5000, dtype=np.uint64),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("writable", [True, False])
def test_an_array_is_shared(registry: Path, kind: str, writable: bool, caplog: pytest.LogCaptureFixture) -> None:
    array = ARRAYS[kind].copy(order="K")
    array.flags.writeable = writable
    model = Arrays(table=array, again=array)
    parts = split(model)
    assert parts.description.nbytes > array.nbytes
    assert len(parts.skeleton) < 4000
    assert parts.description.private == ()
    zc.put(model, "arrays")
    loaded: Any = zc.load("arrays")
    assert loaded.table is loaded.again
    assert (loaded.table.dtype, loaded.table.shape) == (array.dtype, array.shape)
    assert loaded.table.strides == array.strides
    assert loaded.table.flags.writeable == writable
    assert np.array_equal(loaded.table, array)
    assert not caplog.records


def test_writes_to_an_array_stay_in_the_process(registry: Path) -> None:
    zc.put(Arrays(table=np.ones(5000)), "arrays")
    first: Any = zc.load("arrays")
    first.table[:] = 7
    second: Any = zc.load("arrays")
    assert (second.table == 1).all()


def test_a_block_that_writes_to_an_array_is_seen(registry: Path) -> None:
    ref = zc.put(Arrays(table=np.ones(5000)).eval(), "arrays")
    with loading.residents.lend(ref, "cpu", "refuse") as first:
        first.table[0] = 7  # type: ignore[operator, index]
    with loading.residents.lend(ref, "cpu", "refuse") as second:
        assert second is not first
        assert second.table[0] == 1  # type: ignore[index]


def test_a_tensor_over_an_array_stays_over_it(registry: Path) -> None:
    array = np.ones(5000)
    zc.put(Arrays(table=array, view=torch.from_numpy(array)), "arrays")
    loaded: Any = zc.load("arrays")
    loaded.table[0] = 7
    assert loaded.view[0] == 7


def test_arrays_that_are_one_memory_make_another_model_than_two(registry: Path) -> None:
    array = np.ones(5000)
    one = zc.put(Arrays(table=array, view=array[:]), "one")
    two = zc.put(Arrays(table=array.copy(), view=array.copy()), "two")
    assert one.digest != two.digest
    loaded: Any = zc.load("two")
    loaded.table[0] = 7
    assert loaded.view[0] == 1


def test_an_array_is_not_in_private_memory(registry: Path) -> None:
    zc.put(Arrays(table=np.ones(20_000_000)), "arrays")  # 160 MB
    zc.load("arrays")
    before = process_memory().private
    loaded: Any = zc.load("arrays")
    assert loaded.table.sum() == 20_000_000
    assert process_memory().private - before < 5e6


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"x" * 5000, "bytes"),
        (bytearray(5000), "bytearray"),
        ("y" * 5000, "str"),
        (np.arange(20_000.0)[::2], "ndarray"),
        (np.ma.masked_array(np.arange(5000.0), mask=False), "MaskedArray"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_what_cannot_be_shared_is_told_by_its_place(
    registry: Path, value: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    zc.put(Arrays(table=np.ones(3), vocabulary={"words": [value]}), "arrays")
    assert f"Arrays.vocabulary['words'][0] (a {kind})" in zc.models().iloc[0]["why"]
    assert "every process that loads it holds" in caplog.text
    loaded: Any = zc.load("arrays")
    assert np.array_equal(loaded.vocabulary["words"][0], value)


def test_small_things_are_not_worth_a_word(registry: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        zc.put(Arrays(table=np.ones(3), text="y" * 4000, more=np.ones(500)), "arrays")
    assert zc.models().iloc[0]["why"] == ""
    assert not caplog.records


def test_an_output_s_shape_is_found_with_arrays_that_have_no_contents(registry: Path) -> None:
    import dask.array as da

    zc.put(Arrays(table=np.ones(5000)).eval(), "arrays")
    y = zc.predict("arrays", da.ones((10, 4), dtype=np.float32, chunks=5))
    assert y.shape == (10, 4)
    assert (y.compute() == 5000).all()
