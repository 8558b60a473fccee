"""Another process: loads the published models of the zoo, builds each anew itself, and tells in what they differ."""

from __future__ import annotations

import json
import pickle
import sys
import warnings

import torch
from torch import nn

from zcinfer.errors import ZcinferError
from zcinfer.loading import load_ref, loads
from zcinfer.parts import split
from zcinfer.store import ModelRef
from zcinfer.stores import open_store
from zoo import kinds
from zoo.compare import compared, differences
from zoo.facts import in_memory


def told(case: str, ref: ModelRef) -> list[str]:
    """In what the loaded model differs, and the one that is loaded after somebody has written to the first."""
    kind = ref.store.partition(":")[0]
    model, inputs = kinds.build(case)
    found = []
    if kind == "file" and split(model).description.digest != ref.digest:
        found = ["what is built here has another digest"]
    try:
        copy = load_ref(ref)
        found += compared(model, copy, inputs)
        spoil(copy)
        found += [f"loaded again: {what}" for what in differences(kinds.build(case)[0], load_ref(ref))]
    except ZcinferError as error:
        found += [f"{type(error).__name__}: {error}"]
    if loads[-1].store != kind:
        found += [f"it came from the store {loads[-1].store}"]
    # What a Ray store holds slows down whatever comes next: for each model it reads all names in the registry.
    open_store(ref.store).forget(ref.digest)
    return found


def spoil(model: nn.Module) -> None:
    """Write to all memory of a model's tensors."""
    for _, tensor in in_memory(model):
        tensor.untyped_storage().fill_(255)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's own: those are told where the tests build the models
    torch.set_num_threads(1)
    refs = pickle.load(sys.stdin.buffer)
    json.dump({case: told(case, ref) for case, ref in refs.items()}, sys.stdout)
