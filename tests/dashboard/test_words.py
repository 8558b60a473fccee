"""What a history means, from snapshots as a scheduler tells them; and who may look at it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from zcinfer.dashboard.access import Access
from zcinfer.dashboard.history import History
from zcinfer.dashboard.throughput import columns
from zcinfer.dashboard.views import parts
from zcinfer.dashboard.words import bottleneck, sentence, stalled
from zcinfer.devicestate import COLUMNS, DEVICE_COLUMNS
from zcinfer.errors import SettingsError
from zcinfer.nvml import FIGURES
from zcinfer.telemetry import PHASES

BEGUN = 1_800_000_000.0


def job(name: str = "embed", **changed: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("queued", "running", "done", "failed", "cancelled", "retried", "done_again", "before"), 0)
    told = {
        "number": 1,
        "submission": 1,
        "job": f"predict-{name}",
        "name": name,
        "models": [f"{name}@1"],
        "state": "running",
        "total": 100,
        **counts,
        "done": 40,
        "running": 4,
        "queued": 56,
        "begun": BEGUN,
        "ended": None,
        "last": BEGUN + 60,
        "seconds_a_block": 1.5,
        "errors": [],
        "sums": dict.fromkeys(COLUMNS, 0.0) | {"blocks": 40.0, "rows": 4000.0},
    }
    return told | changed


def snapshot(now: float, *jobs: dict[str, Any], begun: float = BEGUN, **spent: float) -> dict[str, Any]:
    second = int(now)
    return {
        "now": now,
        "begun": begun,
        "spent": 0.0,
        "threads": 2,
        "workers": 1,
        "jobs": jobs,
        "devices": [
            {
                "address": "tcp://a",
                "name": "0",
                "host": "node1",
                "totals": dict.fromkeys(COLUMNS, 0.0) | spent,
                "models": ["embed@1"],
                "private": 1,
                "shared": 1,
                "seen": now,
                "gone": None,
                "running": 2,
                "jobs": [],
                "gpus": None,
            }
        ],
        "models": [],
        "stores": [],
        "seconds": (second,),
        "columns": {name: (100.0 if name == "rows" else 0.0,) for name in COLUMNS},
        "history": {"tcp://a": {"seconds": (second,), **dict.fromkeys(DEVICE_COLUMNS, (0.5,))}},
    }


def said(*snapshots: dict[str, Any]) -> str:
    return str(sentence(History.of(snapshots)))


def test_a_job_at_work() -> None:
    assert said(snapshot(BEGUN + 60, job())) == (
        "Running embed: 40 of 100 blocks, 40 %, about 2 minutes left, 1 of 1 device busy, none failed"
    )


def test_parts_of_one_graph_are_one_job() -> None:
    first, second = job(job="a", done=100, running=0, queued=0, state="finished", ended=BEGUN + 50), job(job="b")
    history = History.of([snapshot(BEGUN + 60, first, second)])
    (run,) = history.runs
    assert (run.done, run.total, run.state, run.sums["rows"]) == (140, 200, "running", 8000)
    # The same arrays in a graph twice were counted once.
    (run,) = History.of([snapshot(BEGUN + 60, job(), job())]).runs
    assert (run.total, run.sums["rows"]) == (200, 4000)


def test_several_jobs_at_once() -> None:
    text = said(snapshot(BEGUN + 60, job(), job("classify", submission=2, number=2)))
    assert text.startswith("Running 2 jobs (embed, classify): 80 of 200 blocks, 40 %, ")


def test_a_stall_is_three_times_the_usual() -> None:
    (run,) = History.of([snapshot(BEGUN + 60, job())]).runs
    assert not stalled(run, BEGUN + 60 + 4.4)
    assert stalled(run, BEGUN + 60 + 4.6)
    slow = job(sums=dict.fromkeys(COLUMNS, 0.0) | {"blocks": 10.0, "computing": 300.0})
    (run,) = History.of([snapshot(BEGUN + 60, slow)]).runs
    assert not stalled(run, BEGUN + 60 + 89)  # blocks of half a minute each


def test_a_scheduler_that_came_back_has_not_the_jobs_of_the_first() -> None:
    history = History.of([snapshot(BEGUN + 60, job())])
    history.lose("no scheduler answers there")
    assert str(sentence(history)).endswith("trying again, embed had 40 of 100 blocks when last seen")
    history.take(snapshot(BEGUN + 90, begun=BEGUN + 80))
    assert [run.state for run in history.runs] == ["lost"]
    assert str(sentence(history)) == "Lost embed: 40 of 100 blocks done, its scheduler has ended"


NAMES = {
    "reading": "Reading",
    "model": "Waiting for the model",
    "preparing": "Preparing",
    "to_device": "Copying in",
    "waiting": "Computing",  # more blocks than cores: the cores are what is missing
    "computing": "Computing",
    "from_device": "Copying out",
    "writing": "Writing",
}


@pytest.mark.parametrize("phase", PHASES)
def test_the_bottleneck_is_what_takes_the_time(phase: str) -> None:
    history = History.of([snapshot(BEGUN + 59, job()), snapshot(BEGUN + 60, job(), **{phase: 3.0})])
    assert bottleneck(history.present, BEGUN + 60).name == NAMES[phase]


def test_devices_that_compute_all_the_time_wait_for_nothing() -> None:
    history = History.of([snapshot(BEGUN + 59, job()), snapshot(BEGUN + 60, job(), reading=3.0)])
    (track,) = history.present
    track.rows.extend([(1.0, 0.9, 2.0, 1.0)] * 60)
    track.seconds.extend(range(int(BEGUN) + 1, int(BEGUN) + 61))
    assert bottleneck([track], BEGUN + 60).name == "Computing"


def test_retried_blocks_are_a_segment_and_in_words() -> None:
    html = parts(History.of([snapshot(BEGUN + 60, job(retried=3, done_again=2))]))["progress"]
    widths = dict(re.findall(r'class="s-(\w+)" style="width:([\d.]+)%"', html))
    assert widths == {"done": "38.0", "retried": "2.0", "running": "4.0", "queued": "56.0"}
    text = " ".join(re.sub("<[^>]+>", " ", html).split())
    assert text == "38 done 2 retried 0 failed 4 running 56 queued 1 being tried again"
    assert 'aria-label="40 of 100 blocks done, 2 of them when retried"' in html


def words(html: str) -> str:
    return " ".join(re.sub("<[^>]+>", " ", html).split())


def test_cards_are_told_with_their_history_and_what_is_missing() -> None:
    why = "unavailable: this user may not read it"
    card = {"card": "0", "uuid": "GPU-1", "name": "A", **dict.fromkeys(FIGURES, why), "throttled": "temperature"}
    card |= {"utilization": 73.0, "memory_used": 2e9, "memory_total": 80e9, "temperature": 61.0, "own_memory": 1e9}
    state = snapshot(BEGUN + 60, job())
    state["devices"][0]["gpus"] = [card]
    state["history"]["tcp://a"] |= {"gpu": (73.0,), "gpu_memory": (40e9,)}
    history = History.of([state])
    html = parts(history)["devices"]
    assert "GPU 0 73 % 2.0 GB of 80.0 GB 61 °C slowed by: temperature this worker: 1.0 GB" in words(html)
    assert "power, clocks unavailable: this user may not read it" in words(html)
    (track,) = history.present
    assert track.binned("gpu", BEGUN + 60, 600, 60)[-1] == 73.0
    assert 'points="0,23' in html  # memory and utilisation are drawn
    # None at all, and none known.
    assert "GPU" not in parts(History.of([snapshot(BEGUN + 60, job())]))["devices"]
    state["devices"][0]["gpus"] = "unavailable: Driver Not Loaded"
    assert "Its GPUs unavailable: Driver Not Loaded" in words(parts(History.of([state]))["devices"])


def test_a_card_that_told_nothing_for_a_second_has_a_gap() -> None:
    first, later = snapshot(BEGUN + 59, job()), snapshot(BEGUN + 60, job())
    later["history"]["tcp://a"] |= {"gpu": (None,), "gpu_memory": (None,)}
    (track,) = History.of([first, later]).present
    assert track.mean("gpu", BEGUN + 60, 60) == 0.0


def test_stores_and_their_holders_are_told() -> None:
    state = snapshot(BEGUN + 60, job())
    store = {"device": "tcp://a", "host": "node1", "store": "ray:a:1", "holder": "alive", "healthy": True}
    sizes = {"capacity": 2_000_000_000, "used": 500_000_000, "spilled": 0, "fallback": "unavailable: no grpcio"}
    state["stores"] = [{**store, "sizes": sizes}]
    shown = parts(History.of([state]))
    assert words(shown["models"]).startswith(
        "Store ray:a:1, on node1 used 500.0 MB capacity 2.0 GB spilled, in all 0 B "
        "fallback (files) unavailable: no grpcio holder alive"
    )
    assert 'style="width:25.0%"' in shown["models"]
    assert "holder" not in shown["tiles"]
    state["stores"] = [{**store, "sizes": sizes, "holder": "lost; Ray is starting it again", "healthy": False}]
    shown = parts(History.of([state]))
    assert "holder on node1: lost; Ray is starting it again" in words(shown["tiles"])
    assert 'class="store warn"' in shown["models"]


def test_seconds_that_nobody_saw_are_no_line() -> None:
    points = columns(History.of([snapshot(BEGUN, job()), snapshot(BEGUN + 30, job())]))
    assert points["time"] == [1000 * BEGUN, 1000 * (BEGUN + 1), 1000 * (BEGUN + 30)]
    assert points["all"][0] == points["all"][2] == 20.0  # the mean of five seconds
    assert points["all"][1] != points["all"][1]


def test_names_and_messages_are_text() -> None:
    evil = '<img src=x onerror="alert(1)">'
    error = {"message": evil, "traceback": evil, "count": 1, "places": [evil], "last": None}
    told = job(evil, errors=[error], failed=1, models=[evil])
    state = snapshot(BEGUN + 60, told)
    state["devices"][0] |= {"name": evil, "host": evil, "models": [evil], "jobs": [evil]}
    html = "".join(parts(History.of([state])).values())
    assert "&lt;img" in html
    assert "<img" not in html


def test_others_need_a_password_and_a_name_to_call() -> None:
    with pytest.raises(SettingsError, match="open to whoever reaches"):
        Access("0.0.0.0")
    with pytest.raises(SettingsError, match="--origin"):
        Access("0.0.0.0", passwords="secret")
    assert Access("0.0.0.0", passwords="secret", origins=("node7:1",)).allowed(1) == [
        "127.0.0.1:1",
        "localhost:1",
        "node7:1",
    ]
    assert "secret" not in repr(Access(passwords="secret"))


def test_a_file_of_passwords_is_for_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "passwords"
    path.write_text('{"ann": "one"}')
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="can be read by others"):
        Access.passwords_from(str(path))
    path.chmod(0o600)
    assert Access.passwords_from(str(path)) == {"ann": "one"}
    path.write_text("")
    with pytest.raises(SettingsError, match="empty"):
        Access.passwords_from(str(path))
