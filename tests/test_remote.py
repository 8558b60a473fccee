"""Copies at a URL: what one machine has put another can load; who may write there, and uploads that end halfway."""

from __future__ import annotations

import gc
import hashlib
import hmac
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import dask
import fsspec
import pytest
import torch
from click.testing import CliRunner
from durable import synced
from fsspec.implementations.memory import MemoryFileSystem

import zcinfer as zc
from zcinfer import catalog, cli, loading, publishing, remote_files
from zcinfer.archive import DESCRIPTION, SKELETON, VERIFIED, WEIGHTS, write_archive
from zcinfer.config import registry_at
from zcinfer.errors import (
    ArchiveError,
    ModelNotFound,
    RemoteUnavailable,
    SettingsError,
    UntrustedArchive,
    ZcinferError,
)
from zcinfer.parts import split
from zcinfer.places import shown
from zcinfer.registry import Registry
from zcinfer.remote import COPY, Remote
from zcinfer.shared_directory import SharedDirectory
from zcinfer.store import FileStore


def layer(seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(30, 30).eval()


@pytest.fixture(autouse=True)
def _token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def another_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}" if request.param == "memory" else (tmp_path / "shared").as_uri()
    with dask.config.set({"zcinfer.remote": url}):
        yield url


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """The directory in which copies are kept."""
    with dask.config.set({"zcinfer.remote": str(tmp_path / "shared")}):
        yield tmp_path / "shared"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Registry:
    """The registry of another machine, which has nothing yet."""
    return Registry(tmp_path / "elsewhere")


def only_upload(shared: Path, digest: str) -> Path:
    (upload,) = (shared / digest).iterdir()
    return upload


def nothing_of(registry: Registry) -> bool:
    """Whether a registry has no archive, and nothing half done."""
    return not list(registry.directory.glob("archives/*")) and not list(registry.directory.glob(".tmp-*"))


def test_what_one_machine_has_put_another_loads(registry: Path, url: str, elsewhere: Registry) -> None:
    model = layer()
    ref = zc.put(model, "layer")
    shutil.rmtree(registry)  # the machine is lost
    catalog.connect(f"file:{elsewhere.directory}")
    loaded = zc.load(ref)
    assert torch.equal(loaded.weight, model.weight)
    assert torch.equal(loaded.bias, model.bias)
    assert elsewhere.names.all() == []  # a name means what its own registry says


def test_a_copy_is_written_once(registry: Path, shared: Path) -> None:
    ref = zc.put(layer(), "layer")
    first = only_upload(shared, ref.digest)
    assert {path.name for path in first.iterdir()} == {WEIGHTS, SKELETON, DESCRIPTION, COPY}
    zc.put(layer(), "another-name")
    assert only_upload(shared, ref.digest) == first


def test_what_is_fetched_is_on_disk_before_it_has_its_name(
    registry: Path, url: str, elsewhere: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = zc.put(layer(), "layer").digest
    target = elsewhere.directory / "archives" / digest
    fsync, rename = os.fsync, os.rename
    synced: set[int] = set()
    unsynced: list[str] = []

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def install(source: Path, name: Path) -> None:
        assert name == target
        unsynced.extend(path.name for path in [source, *source.iterdir()] if path.stat().st_ino not in synced)
        rename(source, name)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", install)
    elsewhere.archive(digest)
    assert unsynced == []
    assert target.is_dir()


def test_a_copy_in_a_directory_outlives_a_loss_of_power(registry: Path, tmp_path: Path) -> None:
    archive = Registry(registry).local(zc.put(layer(), "layer").digest)
    write = remote_files.RemoteFiles.write
    before: list[list[str]] = []

    def last(files: remote_files.RemoteFiles, path: str, content: bytes) -> None:
        before.append(disk.missing(tmp_path / "new"))  # what says that the copy is whole comes when it is
        write(files, path, content)

    with synced() as disk, patch.object(remote_files.RemoteFiles, "write", last):
        Remote(str(tmp_path / "new" / "shared")).upload(archive, "layer@1")
    assert before == [[]]
    assert disk.missing(tmp_path / "new") == []
    assert only_upload(tmp_path / "new" / "shared", archive.description.digest).joinpath(COPY).exists()


def test_without_the_setting_nothing_is_fetched_or_imported(tmp_path: Path) -> None:
    script = f"""
import sys
from zcinfer.errors import ModelNotFound
from zcinfer.store import FileStore
try:
    FileStore({str(tmp_path / "none")!r}).fetch("0" * 64)
except ModelNotFound:
    print(sorted({{"fsspec", "zcinfer.remote"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_what_is_nowhere_is_told(url: str, elsewhere: Registry) -> None:
    with pytest.raises(ModelNotFound, match=f"in the registry {elsewhere.directory}, and no copy of 0+ at {url}"):
        elsewhere.archive("0" * 64)
    with pytest.raises(ModelNotFound, match="no digest"):
        elsewhere.archive("../" * 21 + "x")


@pytest.mark.parametrize("name", [WEIGHTS, DESCRIPTION])
def test_an_archive_that_was_cut_is_replaced_from_its_copy(name: str, registry: Path, url: str) -> None:
    model = layer()
    ref = zc.put(model, "layer")
    archive = registry / "archives" / ref.digest
    cut(archive / name)
    assert torch.equal(zc.load(ref).weight, model.weight)
    Registry(registry).local(ref.digest).verify()


def test_an_archive_that_was_cut_and_has_no_copy_is_told(registry: Path, tmp_path: Path) -> None:
    digest = zc.put(layer(), "layer").digest
    cut(registry / "archives" / digest / WEIGHTS)
    for url in ("memory://nothing-here", "http://127.0.0.1:9/models"):
        with (
            dask.config.set({"zcinfer.remote": url}),
            pytest.raises(ArchiveError, match=f"{WEIGHTS} is truncated.*Nor is its copy to be had: .*{url}"),
        ):
            Registry(registry).archive(digest)
    assert (registry / "archives" / digest / WEIGHTS).exists()


@pytest.mark.parametrize("name", [WEIGHTS, SKELETON])
def test_an_archive_that_was_altered_is_replaced_from_its_copy(
    name: str, registry: Path, url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layer()
    ref = zc.put(model, "layer")
    flip(registry / "archives" / ref.digest / name)
    fetched: list[str] = []
    download = Remote.download

    def counted(remote: Remote, digest: str, *arguments: Any, **options: Any) -> Any:
        fetched.append(digest)
        return download(remote, digest, *arguments, **options)

    monkeypatch.setattr(Remote, "download", counted)
    with caplog.at_level(logging.WARNING, "zcinfer"), ThreadPoolExecutor(4) as threads:
        stores = [FileStore(registry) for _ in range(4)]
        found = list(threads.map(lambda store: bytes(store.fetch(ref.digest).buffer), stores))
    assert len(set(found)) == 1
    assert fetched == [ref.digest]
    assert torch.equal(zc.load(ref).weight, model.weight)
    assert [f"{name} was altered" in told and f"replaced by its copy at {url}" in told for told in caplog.messages] == [
        True
    ]
    Registry(registry).local(ref.digest).verify()
    assert not list(registry.glob(".tmp-*"))


def test_an_archive_that_was_altered_and_has_no_copy_is_told(registry: Path) -> None:
    ref = zc.put(layer(), "layer")
    path = registry / "archives" / ref.digest / WEIGHTS
    flip(path)
    with pytest.raises(
        ArchiveError, match=r"was altered.*No copies are kept \(zcinfer\.remote\): zc\.put\(MODEL, 'layer'\)"
    ):
        zc.load(ref)
    with (
        dask.config.set({"zcinfer.remote": "memory://nothing-here"}),
        pytest.raises(ArchiveError, match=r"was altered.*Nor is its copy to be had: no copy of .*put the model again"),
    ):
        zc.load(ref)
    assert path.exists()
    zc.put(layer(), "layer")  # as it says
    assert torch.equal(zc.load(ref).weight, layer().weight)


def test_verify_of_a_directory_that_says_it_is_another_model_mends_that_directory(registry: Path, url: str) -> None:
    ref, other = zc.put(layer(), "layer"), zc.put(torch.nn.Linear(3, 2), "other")
    directory = registry / "archives" / ref.digest
    text = (directory / DESCRIPTION).read_text()
    (directory / DESCRIPTION).write_text(text.replace(ref.digest, other.digest))
    done = CliRunner().invoke(cli.main, ["info", str(directory), "--verify", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["digest"] == ref.digest
    assert (directory / DESCRIPTION).read_text() == text


def test_what_a_disk_has_altered_in_silence_is_found_by_verify(registry: Path, url: str) -> None:
    ref = zc.put(layer(), "layer")
    path = registry / "archives" / ref.digest / WEIGHTS

    def rot() -> None:
        flip(path)  # which changes the times; a disk does not
        seal = Registry(registry).local(ref.digest).seal
        status = path.stat()
        known = [seal, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        path.with_name(VERIFIED).write_text(json.dumps(known))

    rot()
    with dask.config.set({"zcinfer.remote": None}):
        done = CliRunner().invoke(cli.main, ["info", "layer", "--verify"])
        assert done.exit_code == 1
        assert "was altered" in done.output
        with pytest.raises(ArchiveError, match="was altered"):  # by now it is known
            FileStore(registry).fetch(ref.digest)
    rot()
    done = CliRunner().invoke(cli.main, ["info", "layer", "--verify"])
    assert done.exit_code == 0, done.output
    assert "contents agree with their digests" in done.output
    assert torch.equal(zc.load(ref).weight, layer().weight)


def test_a_copy_is_published_under_a_name(registry: Path, url: str, elsewhere: Registry) -> None:
    model = layer()
    digest = zc.put(model, "layer").digest
    shutil.rmtree(registry)
    catalog.connect(f"file:{elsewhere.directory}")
    with pytest.raises(SettingsError, match="without a name"):
        zc.put(f"{url}/{digest}")
    ref = zc.put(f"{url}/{digest}", "found-again")
    assert (ref.name, ref.version, ref.digest) == ("found-again", 1, digest)
    assert torch.equal(zc.load("found-again").weight, model.weight)


def test_a_copy_that_is_put_takes_its_own_size_on_the_disk(
    registry: Path, url: str, elsewhere: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(1000, 1000).eval()
    ref = zc.put(model, "layer")
    catalog.connect(f"file:{elsewhere.directory}")
    found: list[int] = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        fsync(descriptor)
        found.append(sum(path.stat().st_size for path in elsewhere.directory.rglob("*") if path.is_file()))

    def free(shared: SharedDirectory) -> int:
        return int(1.5 * ref.nbytes) - sum(p.stat().st_size for p in shared.path.rglob("*") if p.is_file())

    monkeypatch.setattr(os, "fsync", look)
    monkeypatch.setattr(SharedDirectory, "free", free)
    zc.put(f"{url}/{ref.digest}", "found-again")
    assert ref.nbytes < max(found) < 1.2 * ref.nbytes
    assert torch.equal(zc.load("found-again").weight, model.weight)
    elsewhere.archive(ref.digest).verify()
    assert not list(elsewhere.directory.glob(".tmp-*"))


# --- who may write there -------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


SPOILT = [(name, spoil) for name in (WEIGHTS, SKELETON, DESCRIPTION, COPY) for spoil in (flip, cut)]


@pytest.mark.parametrize(("name", "spoil"), SPOILT)
def test_a_spoilt_copy_is_refused(
    name: str, spoil: Callable[[Path], None], registry: Path, shared: Path, elsewhere: Registry
) -> None:
    digest = zc.put(layer(), "layer").digest
    spoil(only_upload(shared, digest) / name)
    expected = ArchiveError if name in (WEIGHTS, SKELETON) else UntrustedArchive
    with pytest.raises(expected, match=f"{digest}/[0-9a-f]{{32}}") as told:
        elsewhere.archive(digest)
    assert type(told.value) is expected
    assert nothing_of(elsewhere)


@pytest.mark.parametrize("signed", ["by another", "with the good one's", "by nobody"])
def test_code_of_who_can_write_there_is_not_run(
    signed: str,
    registry: Path,
    shared: Path,
    elsewhere: Registry,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    digest = zc.put(layer(), "layer").digest
    good = only_upload(shared, digest)
    parts, ran = split(layer()), tmp_path / "ran"
    bad_skeleton = b"cos\nmkdir\n(V" + str(ran).encode() + b"\ntR."
    described = replace(
        parts.description,
        skeleton_sha256=hashlib.sha256(bad_skeleton).hexdigest(),
        skeleton_nbytes=len(bad_skeleton),
    )
    assert described.digest == digest  # a field, which anybody can write
    forged = write_archive(replace(parts, skeleton=bad_skeleton, description=described), tmp_path / "forged")
    if signed == "by another":
        with monkeypatch.context() as other:
            another_user(other, tmp_path)
            shutil.rmtree(good)
            Remote(str(shared)).upload(forged, "layer@1")
    else:
        for name in (WEIGHTS, SKELETON, DESCRIPTION):
            shutil.copy(forged.directory / name, good / name)
        if signed == "by nobody":
            (good / COPY).write_text("{}")
    with pytest.raises(UntrustedArchive, match=r"not signed with the token of this machine.*zcinfer\.ray\.token-file"):
        elsewhere.archive(digest)
    with pytest.raises(UntrustedArchive):
        zc.put(f"file://{shared}/{digest}", "taken")
    assert not ran.exists()
    assert nothing_of(elsewhere)
    with pytest.raises(ZcinferError):  # what it opens is no module; but it is opened, as was asked for
        zc.put(f"file://{shared}/{digest}", "taken", trust=True)
    assert ran.exists()


def test_nothing_is_signed_with_an_empty_token(
    registry: Path, shared: Path, elsewhere: Registry, tmp_path: Path
) -> None:
    digest = zc.put(layer(), "layer").digest
    upload = only_upload(shared, digest)
    seal = hashlib.sha256((upload / DESCRIPTION).read_bytes()).hexdigest()
    anybodys = hmac.new(b"", f"zcinfer archive {seal}".encode(), hashlib.sha256).hexdigest()
    (upload / COPY).write_text(json.dumps({"signature": anybodys}))
    os.truncate(tmp_path / "state" / "zcinfer" / "ray-token", 0)
    with pytest.raises(SettingsError, match="ray-token is empty"):
        elsewhere.archive(digest)
    with pytest.raises(SettingsError, match="ray-token is empty"):
        zc.put(layer(), "layer")
    assert nothing_of(elsewhere)


def test_a_copy_under_anothers_digest_is_refused(registry: Path, shared: Path, elsewhere: Registry) -> None:
    first, second = zc.put(layer(0), "a").digest, zc.put(layer(1), "b").digest
    shutil.rmtree(shared / first)
    shutil.move(shared / second, shared / first)
    with pytest.raises(ArchiveError, match=f"it is of another model, {second[:12]}"):
        elsewhere.archive(first)
    assert nothing_of(elsewhere)


def test_another_users_copy_does_not_hide_ones_own(
    registry: Path, shared: Path, elsewhere: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as other:
        another_user(other, tmp_path)
        digest = zc.put(layer(), "layer").digest
    with pytest.raises(UntrustedArchive, match="there is none yet"):
        elsewhere.archive(digest)
    zc.put(layer(), "layer")
    assert len(list((shared / digest).iterdir())) == 2
    assert elsewhere.archive(digest).description.digest == digest


def a_plain_file(upload: Path) -> None:
    upload.touch()


def a_folder_for_a_file(upload: Path) -> None:
    (upload / COPY).mkdir(parents=True)


def a_link_in_a_circle(upload: Path) -> None:
    upload.symlink_to(upload)


@pytest.mark.parametrize("spoil", [a_plain_file, a_folder_for_a_file, a_link_in_a_circle])
def test_what_cannot_be_read_does_not_hide_what_is_good(
    spoil: Callable[[Path], None], registry: Path, shared: Path, elsewhere: Registry
) -> None:
    digest = zc.put(layer(), "layer").digest
    good = only_upload(shared, digest)
    first = good.with_name("0" * 32)  # they are tried in the order of their names
    spoil(first)
    elsewhere.archive(digest).verify()
    shutil.rmtree(elsewhere.directory)
    flip(good / WEIGHTS)
    with pytest.raises(ArchiveError, match=f"{good.name} is truncated or altered"):  # says most
        elsewhere.archive(digest)
    shutil.rmtree(good)
    with pytest.raises(RemoteUnavailable, match=f"{first.name}/{COPY} cannot be read"):
        elsewhere.archive(digest)
    assert nothing_of(elsewhere)


@pytest.mark.parametrize("name", [COPY, DESCRIPTION, SKELETON, WEIGHTS])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(
    name: str, registry: Path, shared: Path, elsewhere: Registry
) -> None:
    digest = zc.put(layer(), "layer").digest
    path = only_upload(shared, digest) / name
    path.unlink()
    os.mkfifo(path)
    opened: list[None] = []
    # Gives a reader that waits an end of file: then the test fails, and does not hang
    writer = threading.Thread(target=lambda: opened.append(os.close(os.open(path, os.O_WRONLY))), daemon=True)
    writer.start()
    try:
        with pytest.raises(RemoteUnavailable, match=f"{name} cannot be read: OSError: .*no regular file"):
            elsewhere.archive(digest)
        assert nothing_of(elsewhere)
        assert not opened
    finally:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        writer.join()


def test_a_model_that_is_fetched_keeps_no_other_waiting(registry: Path, shared: Path, elsewhere: Registry) -> None:
    first, second = (zc.put(layer(seed), "layer").digest for seed in (0, 1))
    assert first[:2] != second[:2]
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Registry):
        def make_room(self, digest: str, nbytes: int) -> None:
            begun.set()
            go_on.wait(60)

    fetching = threading.Thread(target=Slow(elsewhere.directory).archive, args=(first,))
    other = threading.Thread(target=elsewhere.archive, args=(second,))
    fetching.start()
    try:
        assert begun.wait(60)
        other.start()
        other.join(20)
        assert not other.is_alive()
        elsewhere.local(second).verify()
        assert fetching.is_alive()
    finally:
        go_on.set()
        fetching.join()
        other.join()
    elsewhere.local(first).verify()


def half_a_copy(upload: Path) -> None:
    upload.mkdir()


@pytest.mark.parametrize("spoil", [half_a_copy, a_plain_file])
@pytest.mark.parametrize("name", ["0" * 32, "f" * 32])
def test_who_trusts_gets_what_another_has_written_beside_what_is_spoilt(
    spoil: Callable[[Path], None],
    name: str,
    registry: Path,
    shared: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    model = layer()
    with monkeypatch.context() as other:
        another_user(other, tmp_path)
        digest = zc.put(model, "layer").digest
    spoil(only_upload(shared, digest).with_name(name))
    zc.delete("layer")
    with pytest.raises((ArchiveError, RemoteUnavailable), match=name):
        zc.put(f"{shared.as_uri()}/{digest}", "taken")
    zc.put(f"{shared.as_uri()}/{digest}", "taken", trust=True)
    assert torch.equal(zc.load("taken").weight, model.weight)


# --- uploads -------------------------------------------------------------------------------------------------------


def test_an_upload_that_is_interrupted_leaves_nothing(registry: Path, shared: Path) -> None:
    archive = Registry(registry).add(split(layer()), "layer")

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Remote(str(shared)).upload(Registry(registry).local(archive.digest), "layer@1", interrupt)
    assert not list(shared.glob("*/*"))


# Uploads from registries at once, in children forked while it has one thread; one that is to be killed is killed when
# it has written the first file. Tells how they ended.
UPLOADER = """
import json, os, sys
from zcinfer.registry import Registry
from zcinfer.remote import Remote

url, digest = sys.argv[1:]
for line in sys.stdin:
    begin, release = os.pipe()
    children = []
    for directory, killed in json.loads(line):
        children.append(os.fork())
        if children[-1] == 0:
            os.close(release)
            archive, remote = Registry(directory).local(digest), Remote(url)
            os.read(begin, 1)
            remote.upload(archive, "layer@1", (lambda nbytes: os.kill(os.getpid(), 9)) if killed else int)
            os._exit(0)
    os.close(begin)
    os.close(release)
    print(json.dumps([os.waitpid(child, 0)[1] for child in children]), flush=True)
"""


def test_two_that_upload_at_once_and_one_that_is_killed(tmp_path: Path, shared: Path, elsewhere: Registry) -> None:
    model, registries = layer(), [Registry(tmp_path / name) for name in "abc"]
    (digest,) = {registry.add(split(model), "layer").digest for registry in registries}
    command = [sys.executable, "-c", UPLOADER, str(shared), digest]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as uploader:

        def ended(*uploads: tuple[Registry, bool]) -> list[int]:
            assert uploader.stdin is not None
            assert uploader.stdout is not None
            print(json.dumps([(str(r.directory), killed) for r, killed in uploads]), file=uploader.stdin, flush=True)
            statuses: list[int] = json.loads(uploader.stdout.readline())
            return statuses

        assert ended((registries[2], True)) == [signal.SIGKILL]
        with pytest.raises(ArchiveError, match="half a copy: its upload was interrupted"):
            elsewhere.archive(digest)
        assert nothing_of(elsewhere)
        assert ended((registries[0], False), (registries[1], False)) == [0, 0]
        uploader.communicate(timeout=60)
    remote = Remote(str(shared))
    whole = [remote.is_whole(digest, upload) for upload in remote.uploads(digest)]
    assert whole.count(False) == 1
    assert whole.count(True) in (1, 2)
    elsewhere.archive(digest).verify()


# --- directories ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["{}/shared", "{}/my models/", "~/shared"])
def test_what_an_error_says_of_a_directory_can_be_done(
    given: str, registry: Path, elsewhere: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = layer()
    with dask.config.set({"zcinfer.remote": given.format(tmp_path)}):
        with monkeypatch.context() as other:
            another_user(other, tmp_path)
            digest = zc.put(model, "layer").digest
            told = json.loads(CliRunner().invoke(cli.main, ["info", "layer", "--json"]).output)["copy"]
        with pytest.raises(UntrustedArchive) as refused:
            elsewhere.archive(digest)
        said = re.search(r"zcinfer put (.*) --name NAME --trust", str(refused.value))
        assert said is not None
        assert said[1] == told == f"file://{tmp_path}/{Path(given).name}/{digest}"
        catalog.connect(f"file:{elsewhere.directory}")
        done = CliRunner().invoke(cli.main, ["put", said[1], "--name", "bert", "--trust"])
        assert done.exit_code == 0, done.output
        assert torch.equal(zc.load("bert").weight, model.weight)


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Root may write everywhere; for a while we are not root."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_directory_of_another_users_model_is_told(registry: Path) -> None:
    archive = Registry(registry).local(zc.put(layer(), "layer").digest)
    with tempfile.TemporaryDirectory() as place:  # others cannot come to tmp_path
        os.chmod(place, 0o755)
        (Path(place) / archive.description.digest).mkdir(mode=0o555)
        with (
            as_an_ordinary_user(),
            pytest.raises(RemoteUnavailable, match=r"cannot be written.*PermissionError.*Give each user a directory"),
        ):
            Remote(place).upload(archive, "layer@1")


def test_a_deleted_model_comes_again_by_its_digest_and_goes_with_the_next(registry: Path, url: str) -> None:
    model = layer(0)
    ref = zc.put(model, "deleted")
    zc.put(layer(1), "another")
    zc.delete("deleted")
    assert not (registry / "archives" / ref.digest).exists()
    assert torch.equal(zc.load(ref).weight, model.weight)
    zc.delete("another")
    assert list((registry / "archives").iterdir()) == []


def test_a_home_that_nobody_has_is_told(elsewhere: Registry) -> None:
    with pytest.raises(SettingsError, match=r"~no-such-user/models.*home directory.*zcinfer\.remote"):
        Remote("~no-such-user/models")


class Buckets(MemoryFileSystem):
    """As an object store that makes the bucket of a directory that is asked for, which s3fs and gcsfs do."""

    protocol = "buckets"
    made: ClassVar[list[str]] = []

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.made.append(path)


def test_no_bucket_is_made(registry: Path, elsewhere: Registry) -> None:
    fsspec.register_implementation("buckets", Buckets, clobber=True)
    with dask.config.set({"zcinfer.remote": f"buckets://{uuid.uuid4().hex}"}):
        ref = zc.put(layer(), "layer")
        assert Buckets.made == []
        elsewhere.archive(ref.digest).verify()


def test_directories_are_made_behind_a_cache_too(registry: Path, shared: Path, elsewhere: Registry) -> None:
    with dask.config.set({"zcinfer.remote": f"simplecache::file://{shared}"}):
        ref = zc.put(layer(), "layer")
    elsewhere.archive(ref.digest).verify()


# --- URLs that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "told"),
    [("gopher://models", "Protocol not known: gopher"), ("oci://models", "needs a package that is not installed")],
)
def test_a_url_that_cannot_be_used_is_told(url: str, told: str, elsewhere: Registry) -> None:
    with dask.config.set({"zcinfer.remote": url}), pytest.raises(SettingsError, match=told):
        elsewhere.archive("0" * 64)


NOWHERE = ["s3://", "s3:///", "s3:/bucket/models", "memory://", "file:", "file://", "file:///", "/", "models"]


@pytest.mark.parametrize("url", [*NOWHERE, "file://models", "local://models", "simplecache::file://models"])
def test_a_url_that_names_no_place_is_refused(
    url: str, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with dask.config.set({"zcinfer.remote": url}), pytest.raises(SettingsError, match=f"'{url}' names no place"):
        zc.put(layer(), "layer")
    assert not list(here.iterdir())


@pytest.mark.parametrize("url", ["memory://models", "memory://models//", "memory:///models/", "file:///a/b///"])
def test_only_slashes_at_the_end_are_taken_off(url: str) -> None:
    assert Remote(url).url == re.sub("/*$", "", url)


def test_a_url_that_does_not_answer_is_told(elsewhere: Registry) -> None:
    with (
        dask.config.set({"zcinfer.remote": "http://127.0.0.1:9/models"}),
        pytest.raises(RemoteUnavailable, match=r"127\.0\.0\.1:9/models cannot be listed: ClientConnectorError"),
    ):
        elsewhere.archive("0" * 64)
    assert nothing_of(elsewhere)


@pytest.mark.parametrize(
    "ask", [zc.models, lambda: zc.connect("file:s3://bucket/models"), lambda: zc.put(layer(), "layer")]
)
def test_a_registry_at_a_url_is_refused_and_told_where_copies_go(
    ask: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    catalog.disconnect()
    with (
        dask.config.set({"zcinfer.registry": "s3://bucket/models", "zcinfer.store": "file"}),
        pytest.raises(SettingsError, match=r"is 's3://bucket/models', but only directories.*set zcinfer\.remote"),
    ):
        ask()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url", ["s3://bucket/models?endpoint_url=x", "memory://models#2", "sftp://me:secret@host/m?x=1"]
)
def test_a_url_with_options_in_it_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match=r"has options in it.*fsspec's configuration") as told:
        Remote(url)
    assert "secret" not in str(told.value)


def test_a_server_that_says_nothing_is_given_up_in_time(
    registry: Path, elsewhere: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/models"
        with dask.config.set({"zcinfer.remote": url}):
            with pytest.raises(RemoteUnavailable, match=f"{url} cannot be listed: TimeoutError: no answer within 0 s"):
                elsewhere.archive("0" * 64)
            with pytest.raises(RemoteUnavailable, match=r"layer@1 is published.*no answer within"):
                zc.put(layer(), "layer")


class Stuck(MemoryFileSystem):
    """A server that stops to answer while a file is read or written."""

    protocol = "stuck"
    go_on: ClassVar[threading.Event] = threading.Event()
    at: ClassVar[str] = ""

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        if mode == self.at and path.endswith(WEIGHTS):
            file.read = file.write = lambda *_: self.go_on.wait(60)
        return file


@pytest.mark.parametrize("mode", ["rb", "wb"])
def test_a_server_that_falls_silent_in_a_file_is_given_up_in_time(
    mode: str, registry: Path, elsewhere: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_files, "_PATIENCE", 0.2)
    monkeypatch.setattr(remote_files, "_SLOWEST", 1e9)
    fsspec.register_implementation("stuck", Stuck, clobber=True)
    url = f"stuck://{uuid.uuid4().hex}"
    archive = Registry(registry).local(zc.put(layer(), "layer").digest)
    if mode == "rb":
        Remote(url).upload(archive, "layer@1")
    monkeypatch.setattr(Stuck, "at", mode)
    upload = partial(Remote(url).upload, archive, "layer@1")
    download = partial(elsewhere.archive, archive.description.digest)
    try:
        with dask.config.set({"zcinfer.remote": url}), pytest.raises(RemoteUnavailable) as told:
            (upload if mode == "wb" else download)()
    finally:
        Stuck.go_on.set()
        Stuck.go_on = threading.Event()
    assert re.search(
        f"{url}/.*/{WEIGHTS} cannot be {'read' if mode == 'rb' else 'written'}: .*no answer", str(told.value)
    )
    assert mode == "rb" or Remote(url).uploads(archive.description.digest) == []
    assert nothing_of(elsewhere)


def test_a_password_is_not_told() -> None:
    assert shown("sftp://me:secret@server:22/models") == "sftp://me:***@server:22/models"
    assert shown("sftp://me:se@cr/et@server/models") == "sftp://me:***@server/models"
    assert shown("sftp://server:22/models/a@b") == "sftp://server:22/models/a@b"
    assert shown("s3://bucket/a:b@c") == "s3://bucket/a:b@c"


def test_a_password_is_in_no_error_and_no_warning(registry: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"memory://me:secret@{uuid.uuid4().hex}"
    with dask.config.set({"zcinfer.remote": url}):
        ref = zc.put(layer(), "layer")
        flip(registry / "archives" / ref.digest / WEIGHTS)
        zc.load(ref)
    assert "replaced by its copy at memory://me:***@" in caplog.text
    assert "secret" not in caplog.text
    with pytest.raises(SettingsError, match="without a name") as told:
        zc.put(f"{url}/{ref.digest}")
    assert "secret" not in str(told.value)
    with pytest.raises(SettingsError, match="only directories") as told:
        registry_at("sftp://me:secret@host/models", "zcinfer.registry")
    assert "secret" not in str(told.value)


def test_a_put_without_its_copy_says_so_and_can_be_repeated(registry: Path, tmp_path: Path) -> None:
    place = tmp_path / "shared"
    place.touch()
    with dask.config.set({"zcinfer.remote": str(place)}):
        with pytest.raises(RemoteUnavailable, match=r"layer@1 is published in .*, and other machines have no copy"):
            zc.put(layer(), "layer")
        with pytest.raises(RemoteUnavailable, match="cannot be listed: NotADirectoryError"):
            Registry(tmp_path / "elsewhere").archive("0" * 64)
        place.unlink()
        ref = zc.put(layer(), "layer")
        assert ref.version == 1
        assert only_upload(place, ref.digest)


def test_what_is_looked_for_on_the_other_machines(registry: Path, tmp_path: Path) -> None:
    assert publishing._shared_place() == registry / "archives"
    with dask.config.set({"zcinfer.remote": f"file://{tmp_path}/shared"}):
        assert publishing._shared_place() == tmp_path / "shared"
    with dask.config.set({"zcinfer.remote": "memory://models"}):
        assert publishing._shared_place() is None


def test_info_tells_of_the_copy(registry: Path, url: str) -> None:
    ref = zc.put(layer(), "layer")
    told = json.loads(CliRunner().invoke(cli.main, ["info", "layer", "--json"]).output)
    assert told["copy"] == f"{url}/{ref.digest}"
    with dask.config.set({"zcinfer.remote": f"{url}-empty"}):
        assert f"none at {url}-empty" in CliRunner().invoke(cli.main, ["info", "layer"]).output
    with dask.config.set({"zcinfer.remote": None}):
        assert "copy" not in json.loads(CliRunner().invoke(cli.main, ["info", "layer", "--json"]).output)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/models", "gopher://models"])
def test_info_tells_what_is_known_where_the_url_does_not_answer(url: str, registry: Path) -> None:
    ref = zc.put(layer(), "layer")
    with dask.config.set({"zcinfer.remote": url}):
        done = CliRunner().invoke(cli.main, ["info", "layer", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["digest"] == ref.digest
    assert re.match(f"not known: .*{url}", told["copy"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_store_in_ray_fetches_it_too(tmp_path: Path, shared: Path, elsewhere: Registry) -> None:
    lost, model = FileStore(tmp_path / "lost"), layer()
    catalog.connect(lost.url)
    ref = zc.put(model, "layer")
    shutil.rmtree(tmp_path / "lost")
    with dask.config.set({"zcinfer.registry": str(elsewhere.directory)}):
        store = catalog.connect("ray")
        try:
            store.publish(ref.digest)
            fetched = loading.load_ref(replace(ref, store=store.url))
            assert loading.loads[-1].store == "ray"
            assert torch.equal(fetched.weight, model.weight)
            # The archive that the holder reads was altered: it is replaced for the holder, too.
            store.forget(ref.digest)
            flip(elsewhere.directory / "archives" / ref.digest / WEIGHTS)
            store.publish(ref.digest)
            assert ref.digest in store.budget().models
            elsewhere.local(ref.digest).verify()
            # A reader whose store has it no more: its own machine's registry is filled from the copy.
            store.forget(ref.digest)
            del fetched
            gc.collect()
            shutil.rmtree(elsewhere.directory)
            again = loading.load_ref(replace(ref, store=store.url))
            assert loading.loads[-1].store == "file"
            assert torch.equal(again.weight, model.weight)
        finally:
            catalog.disconnect()
