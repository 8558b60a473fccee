"""Nothing of our own Ray stays, whatever becomes of the process that started it; and nobody else gets in."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from processes import processes_below

from zcinfer import keeper
from zcinfer.errors import SettingsError, StoreUnavailable
from zcinfer.ray_node import RECORD, sweep

START = """
import os, sys
from zcinfer import keeper
own = keeper.start(100_000_000, 60)
print(own._keeper.pid, flush=True)
"""
CONNECT = """
import os, sys
from zcinfer import keeper
os.environ.update(keeper.ray_environment())
import ray
ray.init(address=sys.argv[1] if sys.argv[1:] else own.address, namespace="zcinfer", log_to_driver=False)
"""
HOLDER = """
class Holder:
    def pid(self):
        return os.getpid()
holder = ray.remote(Holder).options(name="holder", lifetime="detached", num_cpus=0, max_restarts=-1).remote()
print(ray.get(holder.pid.remote()), flush=True)
"""
FORK = """
for last in (False, True):
    if os.fork() == 0:
        if last:
            sys.stdin.read()
        own.stop()
        sys.exit()
    print("forked", flush=True)
"""
WAIT = "sys.stdin.read()"


def until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def left(place: Path) -> list[object]:
    return [*processes_below(place), *place.iterdir()]


def shared_memory(place: Path) -> set[str]:
    """Files in /dev/shm that a Ray below ``place`` has mapped."""
    lines = [line for p in processes_below(place) for line in Path(f"/proc/{p.pid}/maps").read_text().splitlines()]
    return {line[line.index("/dev/shm/") :] for line in lines if "/dev/shm/" in line}


def python(*args: str, **environment: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", *args],
        env=os.environ | environment,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,  # as a terminal's job: Ctrl-C reaches its process group
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    read = process.stdout.readline().strip()
    if not read:
        pytest.fail(process.communicate()[1])
    return read


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Directory for the temporary files of our Rays; at the end nothing may be left there, or running."""
    place = Path(tempfile.mkdtemp(prefix="zck-", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    # A user with a Ray of his own
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
    monkeypatch.setenv("PYTHONPATH", str(Path(keeper.__file__).parents[1]))
    yield place
    until(lambda: not left(place))
    remains = left(place)
    for process in processes_below(place):
        process.kill()
    assert not remains
    place.rmdir()


@pytest.fixture
def run() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def run(*args: str, **environment: str) -> subprocess.Popen[str]:
        started.append(python(*args, **environment))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.ray
def test_a_named_actor_outlives_its_driver_and_its_process(
    place: Path, run: Callable[..., subprocess.Popen[str]]
) -> None:
    own = keeper.start(100_000_000, 60)
    stranger = run("import ray, sys; ray.init(sys.argv[1])", own.address, RAY_AUTH_MODE="token")
    first = run(CONNECT + HOLDER, own.address)
    pid = int(line(first))
    assert first.wait() == 0
    os.kill(pid, signal.SIGKILL)
    again = "holder = ray.get_actor('holder'); print(ray.get(holder.pid.options(max_task_retries=-1).remote()))"
    assert int(line(run(CONNECT + again, own.address))) not in (pid, 0)

    ours = processes_below(place)
    listening = {c.laddr.ip for p in ours for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert not {"dashboard", "monitor"} & {Path(part).stem for p in ours for part in p.cmdline()}

    refusals = stranger.stderr
    assert refusals is not None
    assert until(lambda: "InvalidAuthToken" in refusals.readline())
    stranger.kill()

    # Without a name already, it goes with the last process that has it mapped
    assert shared_memory(place)
    assert all(path.endswith(" (deleted)") for path in shared_memory(place))

    own.stop()
    assert not left(place)
    own.stop()


@pytest.mark.ray
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_parent_ends_by_a_signal(place: Path, run: Callable[..., subprocess.Popen[str]], number: int) -> None:
    parent = run(START + CONNECT + HOLDER + WAIT)
    line(parent), line(parent)
    assert len(processes_below(place)) > 4
    os.killpg(parent.pid, number)
    assert until(lambda: not left(place))


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", ["zcinfer-ray-*", f"*/{RECORD}", "*/session_*", "*/*/sockets/raylet"])
def test_parent_ends_during_start(
    place: Path, run: Callable[..., subprocess.Popen[str]], number: int, moment: str
) -> None:
    parent = run(START + WAIT)
    assert until(lambda: [*place.glob(moment)])
    os.killpg(parent.pid, number)
    parent.wait()
    if moment == "zcinfer-ray-*" and not until(lambda: not [*place.iterdir()], 1):
        # The moment before there is a keeper: left to the next start, once nobody can be about to claim it
        (directory,) = place.iterdir()
        assert {path.name for path in directory.iterdir()} <= {keeper.LOG}
        shutil.rmtree(directory)
    assert until(lambda: not left(place))


@pytest.mark.ray
def test_forked_children_neither_stop_nor_keep(place: Path, run: Callable[..., subprocess.Popen[str]]) -> None:
    parent = run(START + FORK + WAIT)
    kept = psutil.Process(int(line(parent)))
    assert [line(parent), line(parent)] == ["forked", "forked"]
    children = psutil.Process(parent.pid).children()
    waiting = [child for child in children if child.pid != kept.pid]
    assert until(lambda: [child.status() for child in waiting].count(psutil.STATUS_ZOMBIE) == 1)
    assert kept.status() == psutil.STATUS_SLEEPING
    parent.kill()
    assert until(lambda: not left(place))
    assert sum(child.is_running() for child in waiting) >= 1


@pytest.mark.ray
def test_keeper_killed(place: Path, run: Callable[..., subprocess.Popen[str]]) -> None:
    parent = run(START + WAIT)
    os.kill(int(line(parent)), signal.SIGKILL)
    # Another process of this user starts a Ray meanwhile: this one is in use
    sweep(place)
    assert until(lambda: len(processes_below(place)) > 3)
    parent.communicate()
    assert parent.returncode == 0
    assert not left(place)


@pytest.mark.ray
def test_keeper_and_parent_killed(place: Path, run: Callable[..., subprocess.Popen[str]]) -> None:
    parent = run(START + WAIT)
    kept = psutil.Process(int(line(parent)))
    kept.kill()
    parent.kill()
    parent.wait()
    assert until(lambda: not kept.is_running() or kept.status() == psutil.STATUS_ZOMBIE)
    assert len(processes_below(place)) > 3
    sweep(place)
    assert not left(place)


@pytest.mark.ray
def test_a_start_that_fails_says_why_and_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreUnavailable, match="start-timeout"):
        keeper.start(None, 0.5)
    assert not left(place)
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", "{")
    with pytest.raises(StoreUnavailable, match=r"(?s)status 1\..*, or use memory-mapped .*JSONDecodeError"):
        keeper.start(None, 60)
    assert not left(place)


def test_sizes_that_cannot_be(place: Path) -> None:
    with pytest.raises(StoreUnavailable, match="--shm-size"):
        keeper.start(10**15, 60)
    with pytest.raises(SettingsError, match="at least"):
        keeper.start(1000, 60)


def test_sweep_leaves_alone_what_may_yet_be_claimed(place: Path) -> None:
    fresh = place / "zcinfer-ray-fresh"
    fresh.mkdir()
    (place / "zcinfer-ray-link").symlink_to(fresh)
    sweep(place)
    assert fresh.exists()
    (place / "zcinfer-ray-link").unlink()
    (fresh / RECORD).write_text("")
    sweep(place)
    assert not fresh.exists()


def test_processes_that_race_get_one_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(Path(keeper.__file__).parents[1]))
    code = "import sys; from zcinfer import keeper; print(flush=True)"
    code += "; sys.stdin.read(); print(keeper.token_path().read_text())"
    racing = [python(code) for _ in range(8)]
    for process in racing:
        assert process.stdout is not None
        process.stdout.readline()
    for process in racing:
        assert process.stdin is not None
        process.stdin.close()
    tokens = {process.stdout.read().strip() for process in racing if process.stdout is not None}
    for process in racing:
        process.wait()
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
    assert len(tokens) == 1
    assert len(tokens.pop()) == 64
    path = keeper.token_path()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [*path.parent.iterdir()] == [path]
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="0600"):
        keeper.token_path()


@pytest.mark.parametrize(("token", "told"), [("", "is empty"), ("\n", "is empty"), ("ab" * 15, "has 30 characters")])
def test_a_token_that_was_cut_is_refused(
    token: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = keeper.token_path()
    path.write_text(token)
    with pytest.raises(SettingsError, match=f"{path} {told}.*Remove it"):
        keeper.token_path()
    path.unlink()
    assert len(keeper.token_path().read_text()) == 64


def test_a_token_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    done: list[int] = []
    fsync, link = os.fsync, os.link

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        done.append(os.fstat(descriptor).st_ino)

    def linked(source: str, target: Path) -> None:
        assert os.stat(source).st_ino in done
        link(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    path = keeper.token_path()
    assert done == [path.stat().st_ino, path.parent.stat().st_ino]


def test_the_keeper_is_small() -> None:
    code = "import sys, zcinfer.ray_node, zcinfer.keeper; print(sys.modules.keys() & {'ray', 'torch', 'dask', 'numpy'})"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=Path(keeper.__file__).parents[1]) == b"set()\n"
