"""Descriptions: sizes of all dtypes, and tables that are refused before anything is made of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zcinfer.description import ALIGNMENT, ITEMSIZE, TAIL, Description, altered_storages, sha256_each
from zcinfer.errors import ArchiveError
from zcinfer.parts import split

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = nn.Parameter(model[0].weight[::2])
    model[1].bias = model[0].bias
    return model


def as_json() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(split(model()).description)))
    return found


@pytest.mark.parametrize("name", DTYPES)
def test_itemsize_is_torchs(name: str) -> None:
    assert ITEMSIZE[name] == DTYPES[name].itemsize


def test_itemsize_has_no_names_that_torch_has_not() -> None:
    assert ITEMSIZE.keys() == DTYPES.keys()


@pytest.mark.parametrize("empty", [True, False])
def test_json_and_back(empty: bool) -> None:
    description = split(nn.Module() if empty else model()).description
    assert Description.from_json(json.loads(json.dumps(asdict(description)))) == description


def test_storages_are_aligned_apart_and_far_from_the_end() -> None:
    description = split(model()).description
    position = 0
    for storage in description.storages:
        assert storage.offset >= position
        assert storage.offset % ALIGNMENT == 0
        position = storage.offset + storage.nbytes
    assert description.nbytes >= position + TAIL


def test_reading_a_description_imports_no_torch() -> None:
    command = "import sys, zcinfer.description, zcinfer.registry; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True, timeout=60)


# Positions in a tensor's and a storage's row.
STORAGE, DTYPE, OFFSET, SIZE, STRIDE, GRAD, PARAMETER, WHOLE = range(8)
BEGIN, NBYTES, SHA256, NAME = range(4)

# In the model above tensors 0 and 2 have one storage; each of the others is whole.
ABSURD_TENSORS = {
    "storage beyond the last": (0, STORAGE, 99),
    "storage before the first": (0, STORAGE, -1),
    "storage as text": (0, STORAGE, "0"),
    "storage as a float": (0, STORAGE, 0.0),
    "storage as a bool": (0, STORAGE, False),
    "unknown dtype": (0, DTYPE, "float33"),
    "dtype as a list": (0, DTYPE, []),
    "a name of torch that is no dtype": (0, DTYPE, "load"),
    "larger dtype": (0, DTYPE, "complex128"),
    "negative offset": (0, OFFSET, -1),
    "offset beyond the storage": (0, OFFSET, 1 << 40),
    "offset beyond 64 bits": (0, OFFSET, 1 << 64),
    "offset of a whole storage": (3, OFFSET, 1),
    "offset as a float": (0, OFFSET, 0.5),
    "size beyond the storage": (0, SIZE, [5, 4]),
    "huge size": (0, SIZE, [1 << 62, 1 << 62]),
    "huge size beside an empty axis": (0, SIZE, [0, 1 << 63]),
    "negative size": (0, SIZE, [-4, -4]),
    "more sizes than strides": (0, SIZE, [1, 1, 1]),
    "size as text": (0, SIZE, "44"),
    "size as a number": (0, SIZE, 4),
    "smaller size of a whole storage": (3, SIZE, [2]),
    "negative stride": (0, STRIDE, [-4, 1]),
    "stride beyond the storage": (0, STRIDE, [1 << 40, 1]),
    "stride beyond 64 bits": (0, STRIDE, [1 << 64, 1]),
    "stride of a whole storage": (3, STRIDE, [0]),
    "requires_grad as a number": (0, GRAD, 1),
    "parameter as text": (0, PARAMETER, "yes"),
    "whole as nothing": (0, WHOLE, None),
    "whole where it is not": (0, WHOLE, True),
    "null in a size": (0, SIZE, [4, None]),
}


@pytest.mark.parametrize("case", ABSURD_TENSORS)
def test_absurd_tensors_are_refused(case: str) -> None:
    row, column, wrong = ABSURD_TENSORS[case]
    value = as_json()
    assert value["tensors"][row][column] != wrong or type(value["tensors"][row][column]) is not type(wrong)
    value["tensors"][row][column] = wrong
    with pytest.raises(ArchiveError, match="malformed"):
        Description.from_json(value)


def test_a_whole_tensor_must_be_contiguous() -> None:
    """Expanded over many rows it ends where its storage does, and would have to be copied to be resized."""
    value = as_json()
    row = next(row for row in value["tensors"] if row[WHOLE] and row[DTYPE] == "float32")
    elements = row[SIZE][0]
    row[OFFSET], row[SIZE], row[STRIDE] = elements - 1, [1 << 40], [0]
    with pytest.raises(ArchiveError, match="not contiguous"):
        Description.from_json(value)


def test_integers_cannot_require_gradients() -> None:
    value = as_json()
    next(row for row in value["tensors"] if row[DTYPE] == "int64")[GRAD] = True
    with pytest.raises(ArchiveError, match="require gradients"):
        Description.from_json(value)


ABSURD_STORAGES = {
    "over another": (1, BEGIN, 0),
    "unaligned": (1, BEGIN, 257),
    "negative": (0, BEGIN, -256),
    "beyond the buffer": (-1, BEGIN, 1 << 40),
    "as a float": (0, BEGIN, 0.0),
    "as text": (0, BEGIN, "0"),
    "negative length": (0, NBYTES, -1),
    "length into the next": (0, NBYTES, 300),
    "length beyond the buffer": (-1, NBYTES, 1 << 62),
    "length beyond 64 bits": (-1, NBYTES, 1 << 70),
    "digest as a number": (0, SHA256, 1),
    "name as a list": (0, NAME, []),
}


@pytest.mark.parametrize("case", ABSURD_STORAGES)
def test_absurd_storages_are_refused(case: str) -> None:
    row, column, wrong = ABSURD_STORAGES[case]
    value = as_json()
    value["storages"][row][column] = wrong
    with pytest.raises(ArchiveError, match="malformed"):
        Description.from_json(value)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("digest", "x" * 64),
        ("digest", "é" * 64),
        ("digest", "../" * 20 + "etc/"),
        ("digest", "A" * 64),
        ("digest", None),
        ("class_name", 3),
        ("tensors", [3]),
        ("tensors", [{"storage": 0}]),
        ("tensors", [[]]),
        ("tensors", None),
        ("storages", []),
        ("storages", [[0, 0, "", "", ""]]),
        ("storages", ["abcd"]),
        ("storages", 3),
        ("nbytes", -1),
        ("nbytes", 100),
        ("nbytes", 1e9),
        ("nbytes", "9999999"),
        ("skeleton_sha256", []),
        ("skeleton_nbytes", None),
        ("training", [None]),
        ("training", 1),
        ("dtype", 1.5),
        ("requires", {"torch": 2}),
        ("requires", ["torch"]),
        ("requires", None),
    ],
)
def test_absurd_fields_are_refused(field: str, wrong: Any) -> None:
    value = as_json()
    value[field] = wrong
    with pytest.raises(ArchiveError, match="malformed"):
        Description.from_json(value)


@pytest.mark.parametrize("field", as_json())
def test_a_missing_field_is_refused(field: str) -> None:
    value = as_json()
    del value[field]
    with pytest.raises(ArchiveError, match=re.escape(field)):
        Description.from_json(value)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ArchiveError, match="surprise"):
        Description.from_json({**as_json(), "surprise": 1})


def test_hashes_do_not_depend_on_their_neighbours() -> None:
    first, second = np.arange(100, dtype=np.uint8), np.zeros(0, np.uint8)
    assert sha256_each([first, second]) == sha256_each([first]) + sha256_each([second])
    assert len(set(sha256_each([first, second, first[1:], first[:-1]]))) == 4


@pytest.mark.parametrize("position", [0, (16 << 20) - 1, 16 << 20, (16 << 20) + 4])
def test_every_byte_of_a_large_source_counts(position: int) -> None:
    """Sources are hashed in pieces of 16 MiB."""
    source = np.zeros((16 << 20) + 5, np.uint8)
    before = sha256_each([source])
    source[position] = 1
    assert sha256_each([source]) != before


def test_altered_storages_are_named() -> None:
    parts = split(model())
    buffer = np.frombuffer(bytearray(b"".join(parts.pieces())), np.uint8)
    assert altered_storages(buffer, parts.description) == []
    spec = next(s for s in parts.description.storages if s.name == "2.running_mean")
    buffer[spec.offset] ^= 1
    assert altered_storages(buffer, parts.description) == ["2.running_mean"]
