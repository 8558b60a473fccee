"""The public names: all there, all documented, loaded when first used; and the tree of errors is the one drawn."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import zcinfer as zc
from zcinfer import errors

NAMES = [name for name in zc.__all__ if name != "errors"]


def in_a_new_process(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    script = """
import sys
import zcinfer
print(sorted({"torch", "dask", "distributed", "ray", "numpy", "pandas", "zarr", "click"} & sys.modules.keys()))
"""
    assert in_a_new_process(script) == "[]"


def test_refs_and_errors_load_no_torch() -> None:
    script = (
        "import sys, zcinfer; zcinfer.ModelRef, zcinfer.errors.StoreFull; print({'torch', 'ray'} & sys.modules.keys())"
    )
    assert in_a_new_process(script) == "set()"


@pytest.mark.parametrize("name", zc.__all__)
def test_public_name_is_there(name: str) -> None:
    assert getattr(zc, name).__name__ in (name, f"zcinfer.{name}")
    assert name in dir(zc)


def test_all_names_are_sorted_and_typed() -> None:
    assert list(zc.__all__) == sorted(set(zc.__all__))
    assert {*zc._HOME} == {*zc.__all__} - {"ZcinferError", "errors"}
    typed = re.findall(r"^    from \.\w+ import (.+)$", inspect.getsource(zc), re.MULTILINE)
    assert {name for line in typed for name in line.split(", ")} == {*zc._HOME}


def test_other_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'zcinfer' has no attribute 'predcit'"):
        zc.predcit  # type: ignore[attr-defined]  # noqa: B018


def parameters(public: Any) -> list[str]:
    """Names of the parameters, as numpydoc writes them."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = inspect.signature(public).parameters.values()
    return [stars.get(parameter.kind, "") + parameter.name for parameter in found]


def explained(name: str) -> bool:
    """Whether a docstring tells of all parameters, and has an example."""
    text = inspect.cleandoc(getattr(zc, name).__doc__)
    section = "Attributes" if name == "ModelRef" else "Parameters"
    described = re.split(r"\n\n[A-Z]\w+\n---", text.partition(f"{section}\n-----")[2])[0]
    told = [
        re.search(rf"^[*\w, ]*(?<!\w){re.escape(p)}(?!\w)", described, re.MULTILINE)
        for p in parameters(getattr(zc, name))
    ]
    return all(told) and "Examples\n--------\n>>> " in text


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_documented(name: str) -> None:
    assert re.match(r"[A-Z].*\.\n", inspect.cleandoc(getattr(zc, name).__doc__) + "\n")
    if name != "ZcinferError":
        assert explained(name)


def test_tree_of_errors_is_the_one_drawn() -> None:
    assert errors.__doc__ is not None
    drawn, parents = {}, {-4: "Exception"}
    for line in errors.__doc__.partition("::\n")[2].splitlines():
        found = re.match(r"    ([ │├└─]*)(\w+)", line)
        if found:
            depth, name = len(found[1]), found[2]
            parents[depth] = name
            drawn[name] = parents[depth - 4]
    real = {
        name: value.__base__.__name__
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and value.__base__ is not None
    }
    assert drawn == real
    assert len(real) > 10


@pytest.mark.parametrize("name", [name for name, value in vars(errors).items() if isinstance(value, type)])
def test_error_survives_the_way_between_processes(name: str) -> None:
    import pickle

    error = getattr(errors, name)("what was asked, what was found, what to do")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.args) == (type(error), error.args)
    assert type(error).__doc__


def test_the_table_of_modules_names_each_once() -> None:
    root = Path(__file__).parent.parent
    rows = [
        line.split("|")[1] for line in (root / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| `")
    ]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(file.stem for file in (root / "zcinfer").glob("[!_]*.py"))
