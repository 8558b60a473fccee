"""Archives, names and settings from outside: whatever they hold, an error of ours, soon, and no code of theirs.

An archive is spoilt in one of two ways: by accident (bits, lengths, files that are something else), or by somebody who
knows the format and rebuilds all that depends on what was changed: header, digests, seal and the note of having been
compared. The few examples of `make test` are many in the slow tests, and as many as one likes by
``python tests/test_fuzz.py SECONDS``.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsons import positions
from torch import nn

from zcinfer import catalog, config, loading, publishing
from zcinfer.archive import (
    DESCRIPTION,
    SKELETON,
    VERIFIED,
    WEIGHTS,
    Archive,
    _safetensors_header,
)
from zcinfer.cli import main
from zcinfer.description import Description
from zcinfer.errors import ArchiveError, ModelNotFound, SettingsError, StoreFull, UntrustedArchive, ZcinferError
from zcinfer.files import FileBytes, read_whole, write_file
from zcinfer.holder import Holder
from zcinfer.parts import split
from zcinfer.registry import Registry

SECOND = 1.0
# What an archive of 16 kB may take: parsed JSON is larger than its text, and pytest allocates too.
MEMORY = 4_000_000


class Canary:
    """Unpickled, it sings."""

    def __reduce__(self) -> Any:
        return exec, ("import builtins; builtins.zcinfer_canary = True",)


def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 5)).eval()
    model[3].weight = model[2].weight
    model[2].bias = nn.Parameter(model[0].weight[:5, 0].detach())
    return model


@dataclass
class Files:
    """What an archive is made of, taken apart so that it can be changed and put together again."""

    value: Any
    skeleton: bytes
    buffer: bytes

    @classmethod
    def read(cls, directory: Path) -> Files:
        description = Archive(directory).description
        weights = (directory / WEIGHTS).read_bytes()
        value = json.loads((directory / DESCRIPTION).read_bytes())
        return cls(value, (directory / SKELETON).read_bytes(), weights[-description.nbytes :])

    def forge(self, directory: Path, chance: random.Random) -> None:
        """Write them as somebody would who knows the format: whatever can agree, agrees."""
        directory.mkdir(parents=True)
        if isinstance(self.value, dict):
            self.value["skeleton_sha256"] = hashlib.sha256(self.skeleton).hexdigest()
            self.value["skeleton_nbytes"] = len(self.skeleton)
        text = json.dumps(self.value, indent=1).encode()
        seal = hashlib.sha256(text).hexdigest()
        header = b"\xf8\x0f" + bytes(6) + b"{}".ljust(4088)
        with contextlib.suppress(Exception):
            value = {key: part for key, part in self.value.items() if key != "format"}
            header = _safetensors_header(Description.from_json(value, check=False), seal)
        with contextlib.suppress(Exception):
            # The size that the description says; beyond what is there, nothing.
            self.buffer = self.buffer[: self.value["nbytes"]].ljust(min(self.value["nbytes"], 1 << 20), b"\0")
        (directory / DESCRIPTION).write_bytes(text)
        (directory / SKELETON).write_bytes(self.skeleton)
        (directory / WEIGHTS).write_bytes(header + self.buffer)
        if chance.random() < 0.5:
            with contextlib.suppress(OSError, TypeError, KeyError, OverflowError):
                os.truncate(directory / WEIGHTS, len(header) + self.value["nbytes"])  # sparse
        stamp(directory)


def stamp(directory: Path) -> None:
    """The note that all was compared, as zcinfer itself writes it."""
    status = os.stat(directory / WEIGHTS)
    seal = hashlib.sha256((directory / DESCRIPTION).read_bytes()).hexdigest()
    note = [seal, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    (directory / VERIFIED).write_text(json.dumps(note))


# --- what is changed -------------------------------------------------------------------------------------------------

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 255, 257, 4096, 1 << 31, 1 << 40, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, 1 << 64),
    *(10**400, -(1 << 70), 0.0, 0.5, 1e308, float("nan"), float("inf"), "", "0", "x" * 5000, "../../../etc/passwd"),
    *("/dev/zero", "\x1b[2J\x07", "a\0b", "\ud800", "𝕏", "float33", "load", "complex128", "__metadata__"),
    *("zcinfer.pad.0", "0" * 64, [], {}, [[]], [0] * 200, [1 << 62] * 300, [0, 1 << 70], {"a": {"b": []}}),
]


def change_value(value: Any, chance: random.Random) -> None:
    """Change one place of a JSON value."""
    paths = positions(value)
    if not paths:
        return
    # First one of the top, lest nearly all changes be of numbers in tables.
    top = chance.choice(sorted({path[0] for path in paths}, key=str))
    *path, last = chance.choice([path for path in paths if path[0] == top])
    place = value
    for key in path:
        place = place[key]
    what = chance.choice(["remove", "double", "nudge", "scale", "odd", "odd", "swap", "more"])
    if what == "remove":
        del place[last]
    elif what == "double" and isinstance(place, list):
        place.insert(last, copy.deepcopy(place[last]))
    elif what == "nudge" and type(place[last]) is int:
        place[last] += chance.choice([-4096, -256, -4, -1, 1, 2, 4, 255, 256, 4096, 1 << 20])
    elif what == "scale" and type(place[last]) is int:
        place[last] *= chance.choice([-1, 0, 2, 3, 1 << 16, 1 << 32])
    elif what == "swap" and isinstance(place, list) and len(place) > 1:
        chance.shuffle(place)
    elif what == "more" and isinstance(place[last], list):
        place[last].extend(chance.choice([[0] * 70, ["a"], [[]], [1 << 62] * 9]))
    else:
        place[last] = copy.deepcopy(chance.choice(ODD))


TEXTS = [b"[" * 100_000, b'{"a":' * 50_000, b"[" + b"{}," * 100_000 + b"0]", b"1" * 100_000]
TEXTS += [b"{}" * 9, b"\xff\xfe[", b'{"last": 3, "last": 3}', b"NaN", b'"\\ud800"', b"null"]


def change_bytes(content: bytes, chance: random.Random) -> bytes:
    """Some bytes, cut, flipped, doubled, moved or made up."""
    what = chance.choice(["cut", "flip", "insert", "zero", "move", "empty", "head", "text"])
    at = chance.randrange(len(content) + 1)
    if what == "cut":
        return content[:at]
    if what == "flip" and content:
        changed = bytearray(content)
        for _ in range(chance.choice([1, 1, 3, 30])):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if what == "insert":
        return content[:at] + chance.randbytes(chance.choice([1, 2, 256, 4096])) + content[at:]
    if what == "zero":
        return content[:at] + bytes(min(100, len(content) - at)) + content[at + 100 :]
    if what == "move":
        return content[at:] + content[:at]
    if what == "head":
        return chance.randbytes(8) + content[8:]
    if what == "text":
        return chance.choice(TEXTS)
    return b""


def change_file(path: Path, chance: random.Random) -> None:
    """Have something else in the place of a file."""
    path.unlink()
    what = chance.choice(
        ["nothing", "directory", "pipe", "socket", "loop", "dangling", "/dev/zero", "/proc/kmsg", "huge"]
    )
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "dangling":
        path.symlink_to("/nowhere/" + "a" * 200)
    elif what.startswith("/"):
        path.symlink_to(what)
    elif what == "huge":
        path.touch()
        os.truncate(path, 1 << 40)  # takes no room


NAMES = [WEIGHTS, SKELETON, DESCRIPTION]


def spoil(pristine: Path, directory: Path, chance: random.Random) -> str:
    """Write a spoilt archive; returns in which way."""
    way = chance.choice(["bytes", "bytes", "file", "json", "forged", "forged", "forged"])
    if way == "forged":
        files = Files.read(pristine)
        if chance.random() < 0.5:
            files.skeleton = pickle.dumps(Canary())
        for _ in range(chance.choice([0, 1, 1, 1, 2, 5])):
            change_value(files.value, chance)
        if chance.random() < 0.2:
            files.buffer = change_bytes(files.buffer, chance)
        with contextlib.suppress(UnicodeEncodeError, ValueError):
            files.forge(directory, chance)
            return way
        shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(pristine, directory)
    path = directory / chance.choice([*NAMES, VERIFIED])
    if way == "file":
        change_file(path, chance)
    elif way == "json":
        value = json.loads((directory / DESCRIPTION).read_bytes())
        change_value(value, chance)
        with contextlib.suppress(ValueError):
            (directory / DESCRIPTION).write_text(json.dumps(value, indent=1))
    else:
        path.write_bytes(change_bytes(path.read_bytes(), chance))
    if way != "file" and chance.random() < 0.3:
        stamp(directory)
    return way


# --- what is asked of it ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def within_bounds(what: object, slowness: float = 1.0) -> Iterator[None]:
    """Fail where the block takes more than its time or memory, or runs code of an archive."""
    builtins.zcinfer_canary = False  # type: ignore[attr-defined]
    tracemalloc.start()
    begin = time.process_time(), time.perf_counter()
    try:
        yield
        seconds = time.process_time() - begin[0], time.perf_counter() - begin[1]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Other programs may have the processor; a wait for what never comes takes longer than they do.
    assert seconds[0] < slowness * SECOND, f"{what}: {seconds[0]:.2f} s of a processor"
    assert seconds[1] < 20 * SECOND, f"{what}: {seconds[1]:.2f} s"
    assert peak < MEMORY, f"{what}: {peak:,} bytes"
    assert not builtins.zcinfer_canary, f"{what}: code was run"  # type: ignore[attr-defined]


def check_message(error: ZcinferError) -> None:
    """It can be read, and does not have the whole of what was found."""
    assert 20 < len(str(error)) < 5000, str(error)[:1000]
    str(error).encode()


@dataclass
class Bench:
    """A registry with one model, an archive of it outside, and room for spoilt ones."""

    root: Path

    def __post_init__(self) -> None:
        self.registry = self.root / "registry"
        catalog.connect(f"file:{self.registry}")
        self.ref = publishing.put(model(), "model")
        self.saved = publishing.save("model", self.root / "saved")
        self.expected = {name: tensor.clone() for name, tensor in model().state_dict().items()}
        catalog.models(), publishing.load(self.ref), publishing.put(self.saved, "again", trust=True)  # late imports

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.root)) / "archive"

    def from_outside(self, chance: random.Random) -> None:
        """Put, and look at, an archive from outside."""
        directory = self.fresh()
        way = spoil(self.saved, directory, chance)
        with within_bounds((way, directory)):
            try:
                ref = publishing.put(directory, "outside")
            except ZcinferError as error:
                check_message(error)
            else:
                # Nothing was changed but the note, which is not believed.
                assert ref.digest == self.ref.digest
                assert all((directory / n).read_bytes() == (self.saved / n).read_bytes() for n in NAMES)
            told = CliRunner().invoke(main, ["info", str(directory), "--verify"], env={"DASK_ZCINFER__STORE": "file"})
            assert told.exit_code in (0, 1), told.exception
            assert "\x1b[2J" not in told.output
        shutil.rmtree(directory.parent)

    def trusted(self, chance: random.Random) -> None:
        """Put an archive whose code is trusted, and whose numbers may be anything."""
        directory = self.fresh()
        files = Files.read(self.saved)
        for _ in range(chance.choice([1, 1, 2, 3])):
            change_value(files.value, chance)
        try:
            files.forge(directory, chance)
        except (UnicodeEncodeError, ValueError):
            return
        with within_bounds(("trusted", directory)), contextlib.suppress(ZcinferError):
            ref = publishing.put(directory, "trusted", trust=True)
            for tensor in publishing.load(ref).state_dict().values():
                tensor.double().sum()
        shutil.rmtree(directory.parent)

    def in_registry(self, chance: random.Random) -> None:
        """Load a model whose entry in the registry was damaged; nobody can have forged it there."""
        place = self.registry / "archives" / self.ref.digest
        kept = self.fresh()
        shutil.move(place, kept)
        try:
            shutil.copytree(kept, place)
            path = place / chance.choice([*NAMES, VERIFIED])
            if chance.random() < 0.3:
                change_file(path, chance)
            else:
                path.write_bytes(change_bytes(path.read_bytes(), chance))
            loading.residents.clear()
            catalog.connect(f"file:{self.root / 'elsewhere'}")  # a store remembers what it has opened
            catalog.connect(f"file:{self.registry}")
            with within_bounds(("registry", path)):
                try:
                    loaded = publishing.load("model").state_dict()
                except ZcinferError:
                    pass
                else:
                    assert all(torch.equal(tensor, self.expected[name]) for name, tensor in loaded.items())
                catalog.models()
        finally:
            shutil.rmtree(place)
            shutil.move(kept, place)

    def in_names(self, chance: random.Random) -> None:
        """Look up a name whose file was spoilt."""
        path = self.registry / "names" / "spoilt.json"
        good = (self.registry / "names" / "model.json").read_bytes().replace(b'"model"', b'"spoilt"')
        value = json.loads(good)
        what = chance.random()
        try:
            if what < 0.2:
                path.touch()
                change_file(path, chance)
            elif what < 0.6:
                for _ in range(chance.choice([1, 1, 2])):
                    change_value(value, chance)
                path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
            else:
                path.write_bytes(change_bytes(good, chance))
            with within_bounds(("names", value)):
                for ask in (lambda: publishing.load("spoilt"), catalog.models, lambda: catalog.resolve("spoilt@1")):
                    try:
                        ask()
                    except ZcinferError as error:
                        check_message(error)
        finally:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

    def settings(self, chance: random.Random) -> None:
        """Use a setting that has an impossible value."""
        key = chance.choice(sorted(config._KINDS))
        with within_bounds(("settings", key)), dask.config.set({f"zcinfer.{key}": copy.deepcopy(chance.choice(ODD))}):
            for ask in (
                lambda: config.get(key),
                config.registry_directory,
                lambda: Registry(self.registry).names.versions(),
            ):
                with contextlib.suppress(ZcinferError):
                    ask()

    @property
    def entries(self) -> list[Callable[[random.Random], None]]:
        return [self.from_outside, self.trusted, self.in_registry, self.in_names, self.settings]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("fuzz")
    with dask.config.set({"zcinfer.registry": str(root / "registry")}):
        yield Bench(root)
        catalog.disconnect()
        loading.residents.clear()


FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
CHANCE = st.randoms(use_true_random=False)


@pytest.mark.parametrize("entry", ["from_outside", "trusted", "in_registry", "in_names", "settings"])
@FEW
@given(chance=CHANCE)
def test_what_is_spoilt_is_refused_or_read(bench: Bench, entry: str, chance: random.Random) -> None:
    getattr(bench, entry)(chance)


# --- what was found, and what must be refused by that very thing ----------------------------------------------------


def outside(bench: Bench, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bench.saved, tmp_path / "archive"))


def with_canary(bench: Bench, directory: Path) -> Path:
    """The archive with another skeleton, and all that depends on it made anew."""
    files = Files.read(bench.saved)
    files.skeleton = pickle.dumps(Canary())
    files.forge(directory, random.Random(0))
    Archive(directory, ours=False).verify()
    return directory


def has_sung() -> bool:
    return bool(getattr(builtins, "zcinfer_canary", False))


def test_no_code_is_run_unless_it_is_trusted(bench: Bench, tmp_path: Path) -> None:
    directory = with_canary(bench, tmp_path / "archive")
    with within_bounds("canary"), pytest.raises(UntrustedArchive, match="trust=True"):
        publishing.put(directory, "canary")
    with within_bounds("canary"):
        CliRunner().invoke(main, ["info", str(directory), "--verify"], catch_exceptions=False)
        assert CliRunner().invoke(main, ["put", str(directory)]).exit_code == 1
    with pytest.raises(ZcinferError, match="does not put the model together"):
        publishing.put(directory, "canary", trust=True)
    assert has_sung()  # so it would have


def test_a_swapped_skeleton_in_the_registry_is_not_run(bench: Bench, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    place = registry.directory / "archives" / registry.add(split(model()), "x").digest
    (place / SKELETON).write_bytes(pickle.dumps(Canary()))
    catalog.connect(f"file:{registry.directory}")
    with within_bounds("skeleton"), pytest.raises(ArchiveError, match=SKELETON):
        publishing.load("x")
    catalog.connect(f"file:{bench.registry}")


@pytest.mark.parametrize("name", NAMES)
def test_nobody_waits_for_a_pipe(name: str, bench: Bench, tmp_path: Path) -> None:
    directory = outside(bench, tmp_path)
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with within_bounds("pipe"), pytest.raises(ArchiveError, match="no regular file"):
        publishing.put(directory, "pipe")


def test_a_note_from_outside_is_not_believed(bench: Bench, tmp_path: Path) -> None:
    files = Files.read(bench.saved)
    next(row for row in files.value["tensors"] if row[7])[3] = [1 << 40, 6]
    files.forge(tmp_path / "archive", random.Random(0))
    stamp(tmp_path / "archive")
    with pytest.raises(ArchiveError, match="malformed"):
        Archive(tmp_path / "archive", ours=False)


def test_nothing_is_written_beside_an_archive_from_outside(bench: Bench, tmp_path: Path) -> None:
    directory = outside(bench, tmp_path)
    before = sorted(os.listdir(directory)), (directory / VERIFIED).read_bytes()
    publishing.put(directory, "outside")
    CliRunner().invoke(main, ["info", str(directory), "--verify"], catch_exceptions=False)
    assert (sorted(os.listdir(directory)), (directory / VERIFIED).read_bytes()) == before


def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    temporary = tmp_path / f".note.{os.getpid()}-{threading.get_ident()}"
    temporary.symlink_to(tmp_path / "mine")
    write_file(tmp_path / "note", b"new")
    assert ((tmp_path / "mine").read_text(), (tmp_path / "note").read_text()) == ("mine", "new")


def test_an_archive_that_is_replaced_while_it_is_copied_gets_no_trust(bench: Bench, tmp_path: Path) -> None:
    directory = outside(bench, tmp_path)
    registry = Registry(tmp_path / "registry")
    registry.seals.add(Archive(directory))
    opened = registry.seals.open(directory)
    shutil.rmtree(directory)
    forged = Archive(with_canary(bench, directory), ours=False)
    with pytest.raises(ArchiveError, match="became another archive"):
        registry.adopt(opened, "x")
    assert forged not in registry.seals
    assert registry.names.all() == []


def test_a_file_that_is_cut_while_it_is_read_gives_fewer_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with open(tmp_path / "file", "rb") as file:
        found = FileBytes(file.fileno(), 10, 80)
        assert found[5:70].read() == bytes(range(15, 80))
        os.truncate(tmp_path / "file", 20)
        assert found[5:70].read() == bytes(range(15, 20))


@pytest.mark.parametrize("digest", ["../../outside", "/etc", "0" * 63, "A" * 64, 7, None])
def test_no_name_leads_out_of_the_registry(digest: Any, bench: Bench) -> None:
    path = bench.registry / "names" / "climber.json"
    entry = {"name": "climber", "version": 1, "digest": digest, "created": "2026-01-01T00:00:00+00:00"}
    path.write_text(json.dumps({"last": 1, "versions": [entry]}))
    with pytest.raises(ArchiveError, match="Remove the file"):
        publishing.load("climber")
    path.unlink()
    with pytest.raises(ModelNotFound, match="no digest"):
        Registry(bench.registry).archive(str(digest))


def test_files_of_names_that_none_can_have_are_passed_over(bench: Bench) -> None:
    names = Registry(bench.registry).names.all()
    strange = [os.fsdecode(bench.registry / "names") + "/" + os.fsdecode(name) for name in (b"\xff.json", b"%2e.json")]
    for path in strange:
        Path(path).write_text("{}")
    assert Registry(bench.registry).names.all() == names
    for path in strange:
        os.unlink(path)


@pytest.mark.parametrize("chain", ["ab", "aa"])
def test_bases_that_lead_in_a_circle_are_no_bases(chain: str, bench: Bench, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    digests = [registry.add(split(nn.Linear(3, width)), "x").digest for width in (3, 4)]
    (registry.directory / "bases").mkdir()
    places = dict(zip("ab", digests, strict=True))
    for one, other in (chain, chain[::-1]):
        (registry.directory / "bases" / places[one]).write_text(places[other])
    assert registry.base(places["a"]) is None
    holder = Holder(
        1 << 30, lambda array: array.copy(), lambda array: array, lambda arrays, **_: {}, lambda places: set()
    )
    assert len(holder.fetch(places["a"], str(registry.directory))[1]) == 1


def test_others_can_write_to_no_part_of_a_registry(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        registry = Registry(tmp_path / "registry")
        digest = registry.add(split(nn.Linear(3, 3)), "x").digest
    finally:
        os.umask(before)
    parts = [path for path in registry.directory.rglob("*") if not path.name.startswith(".")]
    assert len(parts) > 7
    assert [path for path in parts if path.stat().st_mode & 0o022] == []
    registry.directory.chmod(0o755)
    registry.archive(registry.names.resolve("x").digest)
    for part, ask in (
        ("names", registry.names.versions),
        ("names/x.json", registry.names.versions),
        ("archives", lambda: registry.archive(digest)),
        (f"archives/{digest}/{SKELETON}", lambda: registry.archive(digest)),
    ):
        (registry.directory / part).chmod(0o777)
        with pytest.raises(SettingsError, match="can be written to by others"):
            ask()
        (registry.directory / part).chmod(0o755)


def test_a_disk_that_fills_meanwhile_gives_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path / "registry")
    monkeypatch.setattr("zcinfer.archive.create", lambda path: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(StoreFull, match=r"a model of 5.2 kB does not fit .*No space left on device"):
        registry.add(split(nn.Linear(3, 3)), "x")
    assert registry.names.all() == []


SETTINGS = [("trust-registry", "false"), ("ray.timeout", "soon"), ("ray.timeout", float("nan")), ("residents", -1)]
SETTINGS += [("jobs", 0), ("registry", ["/a"]), ("store", None), ("computing", True), ("registry", "file://[")]
SETTINGS += [("gpu.share", "yes"), ("gpu.share-memory", 1.5), ("gpu.residents", 0)]


@pytest.mark.parametrize(("key", "value"), SETTINGS)
def test_an_impossible_setting_is_named(key: str, value: Any) -> None:
    with dask.config.set({f"zcinfer.{key}": value}), pytest.raises(SettingsError, match=rf"zcinfer\.{key}"):
        config.get(key), config.registry_directory()


def test_every_setting_is_looked_at() -> None:
    tables = {key: value for key, value in config.DEFAULTS.items() if isinstance(value, dict)}
    inner = {f"{table}.{key}" for table, settings in tables.items() for key in settings}
    assert config._KINDS.keys() == config.DEFAULTS.keys() - tables.keys() | inner


@pytest.mark.parametrize("value", [None, 7, "ray", {"ray": None}])
def test_settings_that_are_no_table_are_told(value: Any) -> None:
    with dask.config.set({"zcinfer": value}), pytest.raises(SettingsError, match="must be a table"):
        config.get("ray.timeout")


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", "/dev/zero"])
def test_no_path_of_an_archive_at_all(path: str, bench: Bench) -> None:
    with pytest.raises(ModelNotFound, match="no archive at"):
        publishing.put(path)


def test_a_terminal_is_not_written_to_by_a_name(bench: Bench, tmp_path: Path) -> None:
    files = Files.read(bench.saved)
    files.value["class_name"] = "\x1b[2Jnothing here"
    files.forge(tmp_path / "archive", random.Random(0))
    told = CliRunner().invoke(main, ["info", str(tmp_path / "archive")], catch_exceptions=False)
    assert "\\x1b[2Jnothing here" in told.output
    assert "--trust" in told.output


def test_a_file_without_end_is_not_waited_for() -> None:
    for _ in range(20):  # whatever the kernel has said meanwhile
        with pytest.raises(OSError, match="Errno"):
            read_whole("/proc/kmsg", 1000)


@pytest.mark.slow
def test_many_in_a_process_of_little_memory() -> None:
    done = subprocess.run(
        [sys.executable, __file__, "12", "1"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert all(counts[entry] > 10 for entry in ("from_outside", "trusted", "in_registry", "in_names", "settings")), (
        counts
    )
    assert counts["resident MB more"] < 100, counts


# --- for as long as one likes: make fuzz -----------------------------------------------------------------------------


def fuzz(seconds: float, seed: int) -> None:
    """Try seeds from one on, in a process that may take no more memory than it has and 512 MB."""
    with tempfile.TemporaryDirectory() as root, dask.config.set({"zcinfer.registry": f"{root}/registry"}):
        bench = Bench(Path(root))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 29),) * 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts = dict.fromkeys((entry.__name__ for entry in bench.entries), 0)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for entry in bench.entries:
                try:
                    entry(random.Random(seed))
                except BaseException:
                    print(f"seed {seed}, {entry.__name__}", file=sys.stderr)
                    raise
                counts[entry.__name__] += 1
            seed += 1
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps({**counts, "next seed": seed, "resident MB more": more // 1000}))
        catalog.disconnect()


if __name__ == "__main__":
    fuzz(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time()))
