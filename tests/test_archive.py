"""Archives: readable by others, and never accepted once a byte of them has changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsons import positions
from safetensors import safe_open
from torch import nn

from zcinfer.archive import DESCRIPTION, MARGIN, SKELETON, VERIFIED, WEIGHTS, Archive, write_archive
from zcinfer.description import ITEMSIZE, TAIL, Description
from zcinfer.errors import ArchiveError
from zcinfer.parts import join, split

# Drawing takes long where other processes take the time.
SLOW = [HealthCheck.too_slow]


def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 50), nn.BatchNorm1d(50), nn.Linear(50, 50), nn.Linear(50, 50), nn.Conv1d(2, 3, 3)
    )
    model[3].weight = model[2].weight
    model[4].to(memory_format=torch.contiguous_format).to(torch.bfloat16)
    model[2].bias = nn.Parameter(model[0].weight[:50, 0].detach())
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("small", torch.randn(3).to(torch.float8_e4m3fn))
    model.register_buffer("empty", torch.empty(0, 4))
    model.register_buffer("scalar", torch.tensor(3, dtype=torch.int16))
    return model.eval()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(split(model()), tmp_path_factory.mktemp("pristine") / "archive").directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    """An archive to spoil; untouched since it was verified."""
    copy = tmp_path / "archive"
    shutil.copytree(pristine, copy)
    Archive(copy).verify()
    return copy


def read_all(directory: Path) -> nn.Module:
    """What every store does to get at a model."""
    archive = Archive(directory)
    return join(archive.skeleton(), archive.description, archive.weights())


def stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    """Change bytes in place. The size and the time of the last change of content stay as they were."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    change(content)
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate()
    # The clock of a file system ticks every few milliseconds only.
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(position: int, bit: int = 0) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[position] ^= 1 << bit

    return change


def data_start(directory: Path) -> int:
    return 8 + int.from_bytes((directory / WEIGHTS).read_bytes()[:8], "little")


def test_what_is_written_is_read(directory: Path) -> None:
    parts = split(model())
    archive = Archive(directory)
    assert archive.description == parts.description
    assert archive.skeleton() == parts.skeleton
    assert archive.weights().tobytes() == b"".join(parts.pieces())


def test_an_empty_model_is_written_and_read(tmp_path: Path) -> None:
    directory = write_archive(split(nn.ReLU()), tmp_path / "archive").directory
    assert isinstance(read_all(directory), nn.ReLU)
    with safe_open(directory / WEIGHTS, "pt") as file:
        assert [name for name in file.keys() if not name.startswith("zcinfer.pad.")] == []  # noqa: SIM118


def test_safetensors_finds_the_weights_under_their_names(pristine: Path) -> None:
    expected = model().state_dict()
    with safe_open(pristine / WEIGHTS, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Views and ties live in the table; here a storage goes by the first of its tensors.
    for name in expected.keys() - {"0.weight", "2.bias", "3.weight", "small", "empty"}:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name
    assert found["0.weight"].dtype == torch.uint8
    assert torch.equal(found["0.weight"].view(torch.float32).view(50, 40), expected["0.weight"])
    assert torch.equal(found["small"].view(torch.float8_e4m3fn).float(), expected["small"].float())
    assert found["empty"].numel() == 0
    others = found.keys() - expected.keys()
    assert all(name.startswith("zcinfer.pad.") for name in others)


@pytest.mark.parametrize("name", ["__metadata__", "ein wort mit ü", 'quote"', "a/b"])
def test_odd_names_are_written(name: str, tmp_path: Path) -> None:
    layer = nn.Module()
    layer.register_parameter(name, nn.Parameter(torch.arange(3.0)))
    layer.register_parameter("plain", nn.Parameter(torch.ones(3)))
    directory = write_archive(split(layer), tmp_path / "archive").directory
    assert torch.equal(dict(read_all(directory).named_parameters())[name], torch.arange(3.0))
    with safe_open(directory / WEIGHTS, "pt") as file:
        assert torch.equal(file.get_tensor("plain"), torch.ones(3))


def test_parameters_of_from_pretrained_keep_their_names(tmp_path: Path) -> None:
    """It sets an attribute on every one of them."""
    layer = nn.Linear(3, 4)
    layer.weight._is_hf_initialized = True
    directory = write_archive(split(layer), tmp_path / "archive").directory
    with safe_open(directory / WEIGHTS, "pt") as file:
        assert torch.equal(file.get_tensor("weight"), layer.weight.detach())
    assert read_all(directory).weight._is_hf_initialized is True


def test_nobody_else_may_read_an_archive(pristine: Path) -> None:
    assert stat.S_IMODE(pristine.stat().st_mode) == 0o700


def test_data_begins_on_a_page_with_another_in_front(pristine: Path) -> None:
    assert data_start(pristine) % 4096 == 0
    assert data_start(pristine) >= MARGIN


def test_writes_to_a_model_never_reach_the_file(directory: Path) -> None:
    before = (directory / WEIGHTS).read_bytes()
    copy = read_all(directory)
    with torch.no_grad():
        for tensor in (*copy.parameters(), *copy.buffers()):
            tensor.zero_()
    assert (directory / WEIGHTS).read_bytes() == before
    expected = model().state_dict()
    for name, tensor in read_all(directory).state_dict().items():
        assert torch.equal(tensor.float(), expected[name].float())


# --- when contents are compared: a comparison leaves a new verified.json --------------------------------------------


def test_an_untouched_archive_is_not_compared_again(directory: Path) -> None:
    before = stamp(directory / VERIFIED)
    Archive(directory).weights()
    assert stamp(directory / VERIFIED) == before


def test_a_fresh_archive_is_not_compared(tmp_path: Path) -> None:
    directory = write_archive(split(nn.Linear(2, 2)), tmp_path / "a").directory
    before = stamp(directory / VERIFIED)
    # As the registry does.
    moved = directory.rename(tmp_path / "b")
    Archive(moved).weights()
    assert stamp(moved / VERIFIED) == before


def touch(directory: Path) -> Path:
    os.utime(directory / WEIGHTS, ns=(1, 1))
    return directory


def copy(directory: Path) -> Path:
    shutil.copytree(directory, directory.parent / "copy")
    return directory.parent / "copy"


def forget(directory: Path) -> Path:
    (directory / VERIFIED).unlink()
    return directory


def garble(directory: Path) -> Path:
    (directory / VERIFIED).write_bytes(b"\xff[")
    return directory


@pytest.mark.parametrize("change", [touch, copy, forget, garble])
def test_a_changed_stamp_is_compared_once(change: Callable[[Path], Path], directory: Path) -> None:
    known = (directory / VERIFIED).read_bytes()
    changed = change(directory)
    Archive(changed).weights()
    new = stamp(changed / VERIFIED)
    assert (changed / VERIFIED).read_bytes() != known or change in (forget, garble)
    Archive(changed).weights()
    assert stamp(changed / VERIFIED) == new


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, SKELETON, DESCRIPTION])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused_and_named(name: str, share: float, directory: Path) -> None:
    os.truncate(directory / name, int(share * (directory / name).stat().st_size))
    with pytest.raises(ArchiveError, match=name):
        read_all(directory)


@pytest.mark.parametrize("name", [WEIGHTS, SKELETON, DESCRIPTION])
@pytest.mark.parametrize("added", [b"\0", b" ", b"\n{}"])
def test_a_longer_file_is_refused(name: str, added: bytes, directory: Path) -> None:
    edit(directory / name, lambda content: content.extend(added))
    with pytest.raises(ArchiveError, match=name):
        read_all(directory)


@pytest.mark.parametrize("name", [WEIGHTS, SKELETON, DESCRIPTION])
def test_a_missing_file_is_refused_and_named(name: str, directory: Path) -> None:
    (directory / name).unlink()
    with pytest.raises(ArchiveError, match=name):
        read_all(directory)


def test_a_directory_in_place_of_a_file_is_refused(directory: Path) -> None:
    (directory / SKELETON).unlink()
    (directory / SKELETON).mkdir()
    with pytest.raises(ArchiveError, match=SKELETON):
        read_all(directory)


@pytest.mark.parametrize("name", [WEIGHTS, SKELETON])
def test_a_file_that_goes_after_the_archive_was_opened_is_named(name: str, directory: Path) -> None:
    archive = Archive(directory)
    (directory / name).unlink()
    with pytest.raises(ArchiveError, match=name):
        archive.skeleton(), archive.weights()


def test_weights_cut_after_the_archive_was_opened_are_refused(directory: Path) -> None:
    archive = Archive(directory)
    os.truncate(directory / WEIGHTS, 10_000)
    with pytest.raises(ArchiveError, match=WEIGHTS):
        archive.weights()


def test_no_archive_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="not a complete archive"):
        Archive(tmp_path / "nothing")


def places(directory: Path) -> dict[str, int]:
    """Positions in the weights' file, by what is there."""
    start, size = data_start(directory), (directory / WEIGHTS).stat().st_size
    description = Archive(directory).description
    last = description.storages[-1]
    return {
        "length of the header": 0,
        "high byte of that length": 7,
        "header": 8,
        "an offset in the header": (directory / WEIGHTS).read_bytes().index(b"data_offsets") + 15,
        "end of the header": start - 1,
        "first byte": start,
        "last byte": start + last.offset + last.nbytes - 1,
        "padding": start + description.storages[0].nbytes,
        "end of the padding": start + description.storages[1].offset - 1,
        "tail": start + last.offset + last.nbytes,
        "end": size - 1,
    }


@pytest.mark.parametrize(
    "place",
    [
        "length of the header",
        "high byte of that length",
        "header",
        "an offset in the header",
        "end of the header",
        "first byte",
        "last byte",
        "padding",
        "end of the padding",
        "tail",
        "end",
    ],
)
def test_a_flipped_bit_of_the_weights_is_refused(place: str, directory: Path) -> None:
    position = places(directory)[place]
    edit(directory / WEIGHTS, flip(position))
    with pytest.raises(ArchiveError, match=WEIGHTS):
        read_all(directory)


def test_altered_weights_are_named(directory: Path) -> None:
    spec = next(s for s in Archive(directory).description.storages if s.name == "1.running_var")
    edit(directory / WEIGHTS, flip(data_start(directory) + spec.offset))
    with pytest.raises(ArchiveError, match=r"1\.running_var \(1 of"):
        read_all(directory)


def test_weights_that_were_refused_once_stay_refused(directory: Path) -> None:
    edit(directory / WEIGHTS, flip(-TAIL))
    for _ in range(2):
        with pytest.raises(ArchiveError, match=WEIGHTS):
            read_all(directory)


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_a_flipped_bit_of_the_description_is_refused(pristine: Path, data: st.DataObject) -> None:
    text = (pristine / DESCRIPTION).read_bytes()
    position = data.draw(st.integers(0, len(text) - 1))
    content = bytearray(text)
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    refused_with(pristine, bytes(content))


@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_a_flipped_bit_of_the_skeleton_is_refused(pristine: Path, data: st.DataObject) -> None:
    directory = pristine.parent / "skeleton"
    shutil.copytree(pristine, directory, dirs_exist_ok=True)
    content = bytearray((pristine / SKELETON).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (directory / SKELETON).write_bytes(content)
    with pytest.raises(ArchiveError, match=SKELETON):
        Archive(directory).skeleton()


def refused_with(pristine: Path, text: bytes) -> None:
    """Assert that the archive is refused with that description."""
    directory = pristine.parent / "described"
    shutil.copytree(pristine, directory, dirs_exist_ok=True)
    Archive(directory).verify()
    (directory / DESCRIPTION).write_bytes(text)
    with pytest.raises(ArchiveError):
        read_all(directory)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def edited(value: Any, data: st.DataObject) -> Any:
    """A JSON value with up to three of its places removed, doubled, or replaced."""
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(positions(value)))
        place = value
        for key in path:
            place = place[key]
        what = data.draw(st.sampled_from(["remove", "double", "nudge", "replace", "replace"]))
        if what == "remove":
            del place[last]
        elif what == "double" and isinstance(place, list):
            place.insert(last, place[last])
        elif what == "nudge" and type(place[last]) is int:
            place[last] += data.draw(st.sampled_from([-256, -1, 1, 2, 256, 4096, 1 << 40]))
        else:
            place[last] = data.draw(JSON)
    return value


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_an_edited_description_is_refused(pristine: Path, data: st.DataObject) -> None:
    original = json.loads((pristine / DESCRIPTION).read_bytes())
    text = json.dumps(edited(original, data), indent=1).encode()
    if text != (pristine / DESCRIPTION).read_bytes():
        refused_with(pristine, text)


SMALL = json.dumps(asdict(split(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))).description))


@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_no_description_reaches_outside_its_buffer(data: st.DataObject) -> None:
    value = edited(json.loads(SMALL), data)
    try:
        description = Description.from_json(value)
    except ArchiveError:
        return
    for tensor in description.tensors:
        storage = description.storages[tensor.storage]
        assert 0 <= storage.offset <= storage.offset + storage.nbytes <= description.nbytes - TAIL
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True))
        assert 0 in tensor.size or 0 <= tensor.offset <= last < storage.nbytes // ITEMSIZE[tensor.dtype]


def test_swapped_strides_are_refused(directory: Path) -> None:
    """As possible a table as the true one, but not the one that was written."""
    value = json.loads((directory / DESCRIPTION).read_bytes())
    row = next(row for row in value["tensors"] if row[3] == [50, 40])
    row[4].reverse()
    Description.from_json({key: part for key, part in value.items() if key != "format"})
    (directory / DESCRIPTION).write_text(json.dumps(value, indent=1))
    with pytest.raises(ArchiveError, match=DESCRIPTION):
        read_all(directory)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"format": 1}',
        b'{"format": 99}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": ' + b"1" * 9999,
    ],
)
def test_other_content_of_the_description_is_refused(text: bytes, directory: Path) -> None:
    (directory / DESCRIPTION).write_bytes(text)
    with pytest.raises(ArchiveError, match=str(directory)):
        Archive(directory)


def test_a_huge_table_allocates_nothing(directory: Path) -> None:
    value = json.loads((directory / DESCRIPTION).read_bytes())
    end = value["nbytes"] - TAIL
    value["storages"].append([end, 1 << 40, "0" * 64, "more"])
    value["nbytes"] = size = end + (1 << 40) + TAIL
    (directory / DESCRIPTION).write_text(json.dumps(value, indent=1))
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match=WEIGHTS):
            read_all(directory)
        # Of that very size, but without content: no terabyte is hashed either.
        os.truncate(directory / WEIGHTS, data_start(directory) + size)
        with pytest.raises(ArchiveError, match=DESCRIPTION):
            read_all(directory)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_huge_header_allocates_nothing(directory: Path) -> None:
    header = 1 << 38
    with open(directory / WEIGHTS, "r+b") as file:
        file.write(header.to_bytes(8, "little"))
        file.truncate(8 + header + Archive(directory).description.nbytes)
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match=WEIGHTS):
            read_all(directory)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_the_seal_is_of_the_description(directory: Path) -> None:
    assert Archive(directory).seal == hashlib.sha256((directory / DESCRIPTION).read_bytes()).hexdigest()


def test_a_description_that_forges_its_stamp_reaches_nothing_outside(directory: Path) -> None:
    """Who can write both can have code run anyway (the skeleton); but not by accident, and no memory is read."""
    value = json.loads((directory / DESCRIPTION).read_bytes())
    whole = next(row for row in value["tensors"] if row[7])
    whole[3] = [1 << 40, *whole[3][1:]]
    (directory / DESCRIPTION).write_text(json.dumps(value, indent=1))
    stamp = json.loads((directory / VERIFIED).read_bytes())
    stamp[0] = hashlib.sha256((directory / DESCRIPTION).read_bytes()).hexdigest()
    (directory / VERIFIED).write_text(json.dumps(stamp))
    archive = Archive(directory)
    with pytest.raises(ArchiveError, match="does not fit its weights"):
        join(archive.skeleton(), archive.description, archive.weights())
    with pytest.raises(ArchiveError, match="malformed"):
        archive.verify()
