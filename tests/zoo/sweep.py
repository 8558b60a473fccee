"""Many architectures, one after the other, through the current store and back; and what came of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

import zcinfer as zc
from zoo.compare import seed
from zoo.facts import Facts, differing, named

# What came of an architecture, with the reasons or the differences.
CameOf = tuple[str, list[str]]


# A share takes some seconds of imports and a gigabyte: more than so many are not worth it.
MOST_PROCESSES = 4
SECONDS = 800


class NotBuilt(Exception):
    """There is no small model of this architecture here."""


def by_all_cores(module: str, place: Path) -> dict[str, CameOf]:
    """What came of the architectures of a module of this package, of which each core takes a share.

    Parameters
    ----------
    module : str
        Run as a program, it calls `tell`.
    place : path
        Directory for a registry of each process.
    """
    shares = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    came_of: dict[str, CameOf] = {}
    with ExitStack() as stack:
        processes = []
        for number in range(shares):
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(number), str(shares)],
                cwd=Path(__file__).parents[1],
                env=os.environ | {"DASK_ZCINFER__REGISTRY": str(place / str(number)), "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)  # those that still run where another has failed
        for process in processes:
            told, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, f"{module} ended with status {process.returncode}"
            came_of |= json.loads(told)
    return came_of


def tell(names: Sequence[str], came: Callable[[str], CameOf]) -> None:
    """Print what came of one share of these architectures, by the arguments of the program."""
    number, shares = map(int, sys.argv[1:])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    zc.connect("file")
    # Neighbours are of one package: two processes would both import it.
    share = names[len(names) * number // shares : len(names) * (number + 1) // shares]
    json.dump({name: came(name) for name in share}, sys.stdout)


def through_the_store(build: Callable[[], Module], guesses: Callable[[Any], Iterable[dict[str, Any]]]) -> CameOf:
    """Publish a model, load it, and compare both, also in what they compute from the first guess that fits."""
    try:
        model = build()
    except NotBuilt as error:
        return "not built", [str(error)]
    before, identical = facts(model), identities(model)
    try:
        zc.put(model, "tiny")
        other = zc.load("tiny")
        zc.delete("tiny")
    except zc.ZcinferError as error:
        return "refused", [f"{type(error).__name__}: {error}"]
    except Exception as error:
        return "by tensors", [f"put or load raises {error!r}"]
    after = facts(model)
    wrong = [f"put changed the model: {what}" for what in differing(before, after)]
    wrong += ["put wrote to a tensor, or put another in its place"] if identities(model) != identical else []
    wrong += differing(after, facts(other))
    by_output, found = called(model, other, guesses)
    return ("by output" if by_output else "by tensors"), wrong + found


def facts(model: Module) -> dict[str, Any]:
    return Facts((model, list(model.state_dict()), named(model))).found


def identities(model: Module) -> list[tuple[int, int, int]]:
    """What tells that a tensor was written to or exchanged."""
    return [(id(tensor), tensor._version, tensor.data_ptr()) for _, tensor in named(model)]


def outcome(model: Module, inputs: dict[str, Any]) -> Facts:
    """What a call returns, or raises."""
    seed(2)
    try:
        with torch.no_grad():
            return Facts(model(**inputs), whole=False)
    except Exception as error:  # these inputs are only guessed
        return Facts(repr(error))


def called(model: Module, other: Module, guesses: Callable[[Any], Iterable[dict[str, Any]]]) -> tuple[bool, list[str]]:
    """Whether there were inputs to call both with, and in what they then differ."""
    found: list[str] = []
    for inputs in guesses(model):
        expected = outcome(model, inputs)
        found += differing(expected.found, outcome(other, inputs).found)
        if expected.tensors:
            # And both have changed themselves in the same way.
            return True, found + differing(Facts(named(model)).found, Facts(named(other)).found)
    return False, found


class Summary:
    """What came of all of them.

    Attributes
    ----------
    wrong, refused : dict of str to list of str
        With the reasons.
    built, by_output : int
    text : str
        One line.
    why : str
        The line, and the first reasons of each that is wrong or refused.
    """

    def __init__(self, package: str, came_of: dict[str, CameOf]):
        number = Counter(kind for kind, _ in came_of.values())
        self.wrong = {name: why for name, (kind, why) in came_of.items() if kind.startswith("by") and why}
        self.refused = {name: why for name, (kind, why) in came_of.items() if kind == "refused"}
        self.built, self.by_output = len(came_of) - number["not built"], number["by output"]
        self.text = (
            f"{package}: {self.built} classes built, {self.by_output} compared by output, {number['by tensors']} by "
            f"tensors, {len(self.refused)} refused, {len(self.wrong)} wrong (of {len(came_of)}; {number['not built']} "
            "not built)"
        )
        reasons = [f"{name}: {reason}" for name, some in (self.wrong | self.refused).items() for reason in some[:5]]
        self.why = "\n".join([self.text, *reasons])
