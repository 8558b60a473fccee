"""The page of a cluster costs nothing until somebody comes, and is gone with the cluster however that ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from processes import living, wait_until

import zcinfer as zc
from zcinfer.errors import SettingsError

SCRIPT = """
import sys
import zcinfer
if __name__ == "__main__":
    cluster = zcinfer.LocalCluster(n_workers=1)
    print(cluster.page_link, flush=True)
    sys.stdin.read()
"""


def programs(pid: int | None = None) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children():
        try:
            if "zcinfer.dashboard.child" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def read(link: str) -> str:
    # The first visitor waits for the program's imports.
    with urllib.request.urlopen(link, timeout=60) as answer:
        return str(answer.read().decode())


def opens(link: str) -> bool:
    try:
        return "<h1>" in read(link)
    except OSError:
        return False


@pytest.mark.slow
def test_a_cluster_has_a_page_when_somebody_comes() -> None:
    with zc.LocalCluster(n_workers=1) as cluster:
        link = cluster.page_link
        assert link is not None
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", link)
        assert not programs()
        assert opens(link)
        (program,) = programs()
        # Another visitor finds the same.
        assert opens(link)
        assert programs() == [program]
        # One that is killed is started again, for whoever comes after that was noticed.
        program.kill()
        program.wait(20)
        wait_until(lambda: opens(link))
        (program,) = programs()
    assert not living([program])
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(link, timeout=5)


def test_no_page_where_none_is_wanted() -> None:
    with zc.LocalCluster(n_workers=0, dashboard=False) as cluster:
        assert cluster.page_link is None


def test_no_page_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcinfer.activation.importlib.util.find_spec", lambda _: None)
    with zc.LocalCluster(n_workers=0) as cluster:
        assert cluster.page_link is None
    with pytest.raises(SettingsError, match="dashboard needs the packages"):
        zc.LocalCluster(n_workers=0, dashboard=True)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["started", "starting"])
def test_a_killed_script_leaves_no_page(tmp_path: Path, moment: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        link = script.stdout.readline().strip()
        if moment == "started":
            read(link)
        else:
            with pytest.raises(OSError, match="timed out"):
                urllib.request.urlopen(link, timeout=0.2)
        (program,) = programs(script.pid)
        script.send_signal(signal.SIGKILL)
        wait_until(lambda: not living([program]), 20)
