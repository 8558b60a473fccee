"""The registry: names and versions, archives shared and freed, trust, and processes that race or are killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
from durable import synced
from processes import wait_until
from torch import nn

from zcinfer.archive import DESCRIPTION, SKELETON, WEIGHTS, Archive, write_archive
from zcinfer.errors import ArchiveError, ModelNotFound, SettingsError, StoreFull, UntrustedArchive
from zcinfer.parts import Parts, join, split
from zcinfer.registry import Registry


def parts(seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    return split(nn.Linear(3, 3))


A, B, C = (parts(seed) for seed in range(3))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_what_is_published_outlives_a_loss_of_power(registry: Registry, tmp_path: Path) -> None:
    with synced() as disk:
        registry.add(A, "base")
        registry.add(B, "variant", base=A.description.digest)
        registry.adopt(registry.local(A.description.digest), "adopted")
        saved = registry.save(partial(write_archive, C), tmp_path / "new" / "saved")
    assert {path.name for path in registry.directory.glob("[a-z]*")} == {"archives", "bases", "names", "seals"}
    assert disk.missing(registry.directory) == []
    assert disk.missing(saved.directory.parent) == []


def archives(registry: Registry) -> set[str]:
    return {path.name for path in (registry.directory / "archives").iterdir()}


def litter(registry: Registry) -> set[str]:
    """What lies in a registry and does not belong there."""
    top = {path.name for path in registry.directory.iterdir()} - {
        ".lock",
        ".lock-temporary",
        "archives",
        "names",
        "seals",
    }
    return top | {path.name for path in (registry.directory / "names").glob(".*")}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    # Another file, and so another stamp, however soon after the first.
    path.unlink()
    path.write_bytes(content)


# --- versions ------------------------------------------------------------------------------------------------------


def test_what_is_added_is_found(registry: Registry) -> None:
    version = registry.add(A, "x")
    assert str(version) == "x@1"
    assert registry.names.resolve("x") == version
    archive = registry.archive(version.digest)
    assert archive.description == A.description
    assert archive.weights().tobytes() == b"".join(A.pieces())


def test_versions_count_up(registry: Registry) -> None:
    assert [registry.add(p, "x").version for p in (A, B, C)] == [1, 2, 3]


def test_the_same_content_again_is_no_new_version(registry: Registry) -> None:
    first = registry.add(A, "x")
    assert registry.add(A, "x") == first
    assert registry.names.versions() == [first]


def test_going_back_to_old_content_is_a_new_version(registry: Registry) -> None:
    digests = [registry.add(p, "x").digest for p in (A, B, A)]
    assert [version.version for version in registry.names.versions()] == [1, 2, 3]
    assert digests[0] == digests[2] == registry.names.resolve("x").digest
    assert len(archives(registry)) == 2


def test_an_older_version_is_had_by_its_number(registry: Registry) -> None:
    versions = [registry.add(p, "x") for p in (A, B, C)]
    assert [registry.names.resolve(f"x@{number}") for number in (1, 2, 3)] == versions
    assert registry.names.resolve("x") == versions[2]


@pytest.mark.parametrize("name", ["x@0", "x@3", "x@-1", "x@01", "x@one", "x@1@1", "x@ 1"])
def test_no_such_version(name: str, registry: Registry) -> None:
    registry.add(A, "x")
    registry.add(B, "x")
    with pytest.raises(ModelNotFound, match="there are 1, 2"):
        registry.names.resolve(name)


def test_an_empty_number_is_refused(registry: Registry) -> None:
    registry.add(A, "x")
    with pytest.raises(SettingsError, match="names no version"):
        registry.names.resolve("x@")


def test_names_share_an_archive(registry: Registry) -> None:
    assert registry.add(A, "x").digest == registry.add(A, "y").digest
    assert len(archives(registry)) == 1
    assert registry.names.all() == ["x", "y"]


def test_an_unknown_name_brings_the_nearest(registry: Registry) -> None:
    for name in ("bert-base", "bert-large", "resnet"):
        registry.add(A, name)
    with pytest.raises(ModelNotFound, match=r"'bert-bass'.*'bert-base'") as caught:
        registry.names.resolve("bert-bass")
    assert "resnet" not in str(caught.value)


def test_a_name_like_no_other_brings_all(registry: Registry) -> None:
    registry.add(A, "resnet")
    with pytest.raises(ModelNotFound, match="'resnet'"):
        registry.names.resolve("zzz")


def test_an_empty_registry_says_so_and_is_not_made(registry: Registry) -> None:
    with pytest.raises(ModelNotFound, match="empty"):
        registry.names.resolve("x")
    assert registry.names.all() == registry.names.versions() == []
    assert not registry.directory.exists()


# --- names ---------------------------------------------------------------------------------------------------------

GOOD = [
    "a",
    "A",
    "_x",
    "1",
    "org/model",
    "a.b-c_d",
    "a/../b",
    "a//b",
    "a/",
    "x.json",
    "a" * 200,
]
BAD = ["", ".", "..", "../x", "/x", "./x", ".x", "-x", "a@1", "a b", "a\n", "a\0b", "ä", "~x", "a\\b", "%2e", "a:b"]


@pytest.mark.parametrize("name", [*GOOD, "a/" * 60])
def test_a_good_name_comes_back_and_stays_inside(name: str, registry: Registry, tmp_path: Path) -> None:
    registry.add(A, name)
    assert registry.names.all() == [name]
    assert registry.names.resolve(f"{name}@1") == registry.names.resolve(name)
    assert os.listdir(tmp_path) == ["registry"]
    assert len(os.listdir(registry.directory / "names")) == 1
    assert litter(registry) == set()
    registry.remove(name)
    assert registry.names.all() == []


@pytest.mark.parametrize("name", [*BAD, "a" * 201, "a/" * 100])
def test_a_bad_name_is_refused_before_anything_is_written(name: str, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be a model's name"):
        registry.add(A, name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [bad for bad in BAD if "@" not in bad])
def test_a_bad_name_is_not_looked_for(name: str, registry: Registry) -> None:
    with pytest.raises(SettingsError):
        registry.names.resolve(name)
    with pytest.raises(SettingsError):
        registry.remove(name)


def test_all_good_names_live_side_by_side(registry: Registry) -> None:
    for name in GOOD:
        registry.add(A, name)
    assert registry.names.all() == sorted(GOOD)


# --- removal -------------------------------------------------------------------------------------------------------


def test_removing_frees_what_no_name_refers_to(registry: Registry) -> None:
    first, shared, kept = registry.add(A, "x"), registry.add(B, "x"), registry.add(C, "y")
    registry.add(B, "y")
    assert registry.remove("x") == [first.digest]
    assert archives(registry) == {shared.digest, kept.digest}
    assert registry.names.all() == ["y"]
    assert litter(registry) == set()


def test_removing_one_version_keeps_the_others(registry: Registry) -> None:
    first, second = registry.add(A, "x"), registry.add(B, "x")
    assert registry.remove("x@1") == [first.digest]
    assert registry.names.versions() == [second]
    assert archives(registry) == {second.digest}


def test_content_that_another_version_has_is_kept(registry: Registry) -> None:
    for content in (A, B, A):
        registry.add(content, "x")
    assert registry.remove("x@1") == []
    assert registry.archive(registry.names.resolve("x@3").digest).weights().any()


@pytest.mark.parametrize("gone", ["x", "x@2"])
def test_a_number_is_never_given_again(gone: str, registry: Registry) -> None:
    """Who has written down "x@2" must not get another model one day."""
    registry.add(A, "x")
    registry.add(B, "x")
    registry.remove(gone)
    with pytest.raises(ModelNotFound):
        registry.names.resolve("x@2")
    assert registry.add(C, "x").version == 3


def test_a_version_is_removed_only_if_it_is_what_was_meant(registry: Registry) -> None:
    version = registry.add(A, "x")
    with pytest.raises(ModelNotFound, match="another model"):
        registry.remove("x@1", digest=B.description.digest)
    assert registry.names.versions() == [version]
    assert registry.remove("x@1", digest=A.description.digest) == [version.digest]


def test_removing_the_last_version_removes_the_name(registry: Registry) -> None:
    registry.add(A, "x")
    registry.remove("x@1")
    assert registry.names.all() == []
    assert archives(registry) == set()


@pytest.mark.parametrize("name", ["y", "x@2"])
def test_removing_what_is_not_there_changes_nothing(name: str, registry: Registry) -> None:
    version = registry.add(A, "x")
    with pytest.raises(ModelNotFound):
        registry.remove(name)
    assert registry.names.versions() == [version]


def test_who_has_a_model_mapped_keeps_it(registry: Registry) -> None:
    archive = registry.archive(registry.add(A, "x").digest)
    weights = archive.weights()
    registry.remove("x")
    assert weights.tobytes() == b"".join(A.pieces())


def test_a_removed_model_can_be_added_again(registry: Registry) -> None:
    registry.add(A, "x")
    registry.remove("x")
    registry.archive(registry.add(A, "x").digest).verify()


# --- what is damaged, foreign or not there ---------------------------------------------------------------------------


def test_only_its_user_may_enter(registry: Registry) -> None:
    registry.add(A, "x")
    assert stat.S_IMODE(registry.directory.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_registry_that_others_can_write_to_is_refused(mode: int, registry: Registry) -> None:
    version = registry.add(A, "x")
    registry.directory.chmod(mode)
    with pytest.raises(SettingsError, match=r"chmod 700.*trust-registry"):
        registry.archive(version.digest)
    with pytest.raises(SettingsError, match=r"chmod 700.*trust-registry"):
        registry.add(B, "x")
    with dask.config.set({"zcinfer.trust-registry": True}):
        registry.archive(version.digest).verify()


def test_a_registry_that_others_can_read_is_fine(registry: Registry) -> None:
    version = registry.add(A, "x")
    registry.directory.chmod(0o755)
    registry.archive(version.digest).verify()


def test_an_unknown_digest_is_refused(registry: Registry) -> None:
    registry.add(A, "x")
    with pytest.raises(ModelNotFound, match="no archive"):
        registry.archive("0" * 64)


def test_an_archive_under_anothers_digest_is_refused(registry: Registry) -> None:
    version = registry.add(A, "x")
    directory = registry.directory / "archives"
    (directory / version.digest).rename(directory / ("0" * 64))
    with pytest.raises(ArchiveError, match="another model"):
        registry.archive("0" * 64)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a weight": lambda directory: flip(directory / WEIGHTS, 4096),
    "the skeleton": lambda directory: flip(directory / SKELETON, 10),
    "the description": lambda directory: flip(directory / DESCRIPTION, 10),
    "no skeleton": lambda directory: (directory / SKELETON).unlink(),
    "no weights": lambda directory: (directory / WEIGHTS).unlink(),
    "no description": lambda directory: (directory / DESCRIPTION).unlink(),
    "cut weights": lambda directory: os.truncate(directory / WEIGHTS, 5000),
    "an empty directory": lambda directory: (shutil.rmtree(directory), directory.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_publishing_again_mends_a_damaged_archive(damage: str, registry: Registry) -> None:
    version = registry.add(A, "x")
    DAMAGE[damage](registry.directory / "archives" / version.digest)
    assert registry.add(A, "x") == version
    archive = registry.archive(version.digest)
    archive.verify()
    assert archive.weights().tobytes() == b"".join(A.pieces())
    assert litter(registry) == set()


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"name": "x"}]', "3", '{"a": 1}'])
def test_damaged_versions_are_named(text: str, registry: Registry) -> None:
    registry.add(A, "x")
    (registry.directory / "names" / "x.json").write_text(text)
    with pytest.raises(ArchiveError, match=r"names/x\.json"):
        registry.names.resolve("x")


def failing(content: Parts) -> Parts:
    """Parts whose second storage cannot be written any more, as on a disk that fills up."""
    return replace(content, sources=content.sources[:1])


def test_an_add_that_fails_leaves_nothing(registry: Registry) -> None:
    kept = registry.add(B, "x")
    with pytest.raises(ValueError, match="shorter"):
        registry.add(failing(A), "x")
    assert registry.names.versions() == [kept]
    assert archives(registry) == {kept.digest}
    assert litter(registry) == set()


def test_a_save_that_fails_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        registry.save(partial(write_archive, failing(A)), tmp_path / "saved" / "archive")
    assert os.listdir(tmp_path / "saved") == []


def test_a_model_too_large_for_the_disk_is_refused(registry: Registry) -> None:
    with pytest.raises(StoreFull, match="does not fit on the disk"):
        registry.make_room("0" * 64, 1 << 60)


def test_a_model_that_is_there_needs_no_room(registry: Registry) -> None:
    registry.make_room(registry.add(A, "x").digest, 1 << 60)


# --- trust ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(registry: Registry, tmp_path: Path) -> Path:
    return registry.save(partial(write_archive, A), tmp_path / "elsewhere" / "archive").directory


def test_what_this_user_saved_opens(registry: Registry, saved: Path) -> None:
    archive = registry.seals.open(saved)
    copy = join(archive.skeleton(), archive.description, archive.weights())
    assert split(copy).description == A.description
    assert os.listdir(saved.parent) == ["archive"]


def test_saving_registers_no_name(registry: Registry, saved: Path) -> None:
    assert registry.names.all() == []


def test_a_copy_of_what_this_user_saved_opens(registry: Registry, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    assert registry.seals.open(tmp_path / "copy").description == A.description


def test_what_is_in_the_registry_opens_from_there_too(registry: Registry) -> None:
    version = registry.add(A, "x")
    registry.seals.open(registry.directory / "archives" / version.digest)


def test_another_users_archive_is_refused(saved: Path, tmp_path: Path) -> None:
    stranger = Registry(tmp_path / "stranger")
    stranger.add(B, "x")
    with pytest.raises(UntrustedArchive, match="--trust"):
        stranger.seals.open(saved)


def test_a_registry_of_another_user_with_the_same_model_does_not_vouch(saved: Path, tmp_path: Path) -> None:
    """Only the very description that was written counts, with all that hangs on it."""
    stranger = Registry(tmp_path / "stranger")
    stranger.add(A, "x")
    text = json.loads((saved / DESCRIPTION).read_bytes())
    (saved / DESCRIPTION).write_text(json.dumps(text | {"class_name": "other.Linear"}, indent=1))
    with pytest.raises(UntrustedArchive):
        stranger.seals.open(saved)


def test_a_changed_skeleton_is_refused(registry: Registry, saved: Path) -> None:
    flip(saved / SKELETON, 5)
    with pytest.raises(ArchiveError, match=SKELETON):
        registry.seals.open(saved)


def test_a_changed_skeleton_with_its_new_digest_is_refused(registry: Registry, saved: Path) -> None:
    evil = B.skeleton + b"."
    description = json.loads((saved / DESCRIPTION).read_bytes())
    description["skeleton_sha256"] = hashlib.sha256(evil).hexdigest()
    (saved / SKELETON).write_bytes(evil)
    (saved / DESCRIPTION).write_text(json.dumps(description, indent=1))
    with pytest.raises(UntrustedArchive):
        registry.seals.open(saved)


def test_changed_weights_are_refused_whatever_the_stamp_says(registry: Registry, saved: Path) -> None:
    flip(saved / WEIGHTS, 4096)
    archive = Archive(saved)
    (saved / "verified.json").write_text(json.dumps(archive._stamp()))
    with pytest.raises(ArchiveError, match=WEIGHTS):
        registry.seals.open(saved)


def test_saving_over_something_is_refused(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(SettingsError, match="exists"):
        registry.save(partial(write_archive, A), tmp_path / "there")


# --- several processes ---------------------------------------------------------------------------------------------

# Adds models in children of its own, forked while it has one thread, and tells their ids and, later, how they ended.
WRITER = """
import json, os, sys
import torch
from zcinfer.parts import split
from zcinfer.registry import Registry

def parts(seed, width):
    torch.manual_seed(seed)
    return split(torch.nn.Linear(width, width))

models = {"small": parts(0, 3), "other": parts(1, 3), "large": parts(2, 3000)}
print(json.dumps({name: p.description.digest for name, p in models.items()}), flush=True)
for line in sys.stdin:
    directory, additions = json.loads(line)
    begin, release = os.pipe()
    children = []
    for model, name in additions:
        child = os.fork()
        if child == 0:
            os.close(release)
            os.read(begin, 1)
            Registry(directory).add(models[model], name)
            os._exit(0)
        children.append(child)
    os.close(begin)
    print(json.dumps(children), flush=True)
    os.close(release)
    sys.stdin.readline()  # until then an ended child keeps its id, which may be sent signals
    print(json.dumps([os.waitpid(child, 0)[1] for child in children]), flush=True)
"""


class Writer:
    """Processes that add models to a registry: all at once, and to be killed."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process
        self.digests: dict[str, str] = self._read()

    def start(self, registry: Registry, *additions: tuple[str, str]) -> list[int]:
        self._write([str(registry.directory), additions])
        pids: list[int] = self._read()
        return pids

    def ended(self) -> list[int]:
        self._write("wait for them")
        statuses: list[int] = self._read()
        return statuses

    def _write(self, line: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def writer() -> Iterator[Writer]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Writer(process)
        process.communicate()


@pytest.mark.parametrize("model", ["small", "large"])
def test_processes_that_add_the_same_model_make_one_version(model: str, writer: Writer, registry: Registry) -> None:
    writer.start(registry, *[(model, "x")] * 4)
    assert writer.ended() == [0] * 4
    (version,) = registry.names.versions()
    assert (version.version, version.digest) == (1, writer.digests[model])
    registry.archive(version.digest).verify()
    assert archives(registry) == {version.digest}
    assert litter(registry) == set()


def test_processes_that_add_different_models_lose_none(writer: Writer, registry: Registry) -> None:
    writer.start(registry, ("small", "x"), ("other", "x"), ("large", "x"), ("small", "y"), ("other", "z"))
    assert writer.ended() == [0] * 5
    of_x = [version for version in registry.names.versions() if version.name == "x"]
    assert [version.version for version in of_x] == [1, 2, 3]
    assert {version.digest for version in of_x} == set(writer.digests.values()) == archives(registry)
    assert registry.names.all() == ["x", "y", "z"]


def written(registry: Registry, nbytes: int) -> bool:
    sizes = [path.stat().st_size for path in registry.directory.glob(f".tmp-*/archive/{WEIGHTS}")]
    return max(sizes, default=-1) >= nbytes or any(registry.directory.glob("archives/*"))


MOMENTS: dict[str, Callable[[Registry], object]] = {
    "at once": lambda registry: True,
    "first byte": lambda registry: written(registry, 0),
    "a third": lambda registry: written(registry, 12_000_000),
    "two thirds": lambda registry: written(registry, 24_000_000),
    "all weights": lambda registry: written(registry, 36_000_000),
    "seal": lambda registry: any(registry.directory.glob("seals/*")),
    "archive": lambda registry: any(registry.directory.glob("archives/*")),
    "names": lambda registry: (registry.directory / "names").exists(),
    "name": lambda registry: any(registry.directory.glob("names/*.json")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_killed_while_it_adds_leaves_nothing_half(moment: str, writer: Writer, registry: Registry) -> None:
    digest = writer.digests["large"]
    (pid,) = writer.start(registry, ("large", "x"))
    reached = MOMENTS[moment]
    while not reached(registry):  # without a pause: the moments are short
        pass
    os.kill(pid, signal.SIGKILL)
    writer.ended()

    if registry.names.all():
        assert registry.names.resolve("x").digest == digest
    if (registry.directory / "archives" / digest).exists():
        registry.archive(digest).verify()

    # The next one, whatever it adds, clears up.
    registry.add(B, "y")
    assert litter(registry) == set()
    assert archives(registry) <= {digest, B.description.digest}
    writer.start(registry, ("large", "x"))
    assert writer.ended() == [0]
    registry.archive(digest).verify()
    assert registry.names.resolve("x").version == 1


def test_what_an_ended_process_left_is_cleared(registry: Registry) -> None:
    registry.add(A, "x")
    left = registry.directory / ".tmp-left" / "archive"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(b"half")
    registry.add(B, "x")
    assert litter(registry) == set()


def test_what_a_process_still_writes_is_kept(registry: Registry) -> None:
    with registry.shared.temporary() as mine:
        registry.add(A, "x")
        assert mine.exists()
    assert litter(registry) == set()


def test_an_archive_that_got_no_name_goes_with_the_next_removal(registry: Registry) -> None:
    """As after a process that was killed between the two."""
    registry.add(A, "x")
    nameless = registry.add(B, "y")
    (registry.directory / "names" / "y.json").unlink()
    assert nameless.digest in registry.remove("x")
    assert archives(registry) == set()


def test_many_killed_processes_leave_no_more_than_one(writer: Writer, registry: Registry) -> None:
    for number in range(6):
        (pid,) = writer.start(registry, ("large", "x"))
        wait_until(partial(written, registry, number * 6_000_000))
        os.kill(pid, signal.SIGKILL)
        writer.ended()
        assert len(list(registry.directory.glob(".tmp-*"))) <= 1
    registry.add(B, "y")
    assert litter(registry) == set()
    assert len(list((registry.directory / "seals").iterdir())) <= 2
