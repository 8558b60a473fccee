"""How stores are told: in words, and by one worker of a machine for all."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import zcinfer as zc
from zcinfer import stores
from zcinfer.condition import mapped, of_files, of_ray
from zcinfer.errors import StoreUnavailable
from zcinfer.watching import Watch


@pytest.mark.parametrize(
    ("state", "restarts", "words", "healthy"),
    [
        ("ALIVE", 0, "alive", True),
        ("ALIVE", 1, "alive, after 1 restart", True),
        ("RESTARTING", 3, "lost; Ray is starting it again", False),
        ("PENDING_CREATION", 0, "being started", False),
        ("DEAD", 1, "dead: models that are not loaded yet come from their archives", False),
        ("SOMETHING", 0, "SOMETHING", False),
    ],
)
def test_a_holder_in_words(state: str, restarts: int, words: str, healthy: bool) -> None:
    found = of_ray("ray:a:1", {"used": 1}, {"State": state, "NumRestarts": restarts})
    assert (found.holder, found.healthy, found.plain()["sizes"]) == (words, healthy, {"used": 1})


def test_a_holder_that_ray_does_not_know_is_dead() -> None:
    assert of_ray("ray:a:1", {}, None).holder.startswith("dead")


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    found = of_files("file:x", tmp_path / "gone")
    assert not found.healthy
    assert str(found.sizes["free"]).startswith("unavailable: ")


def test_only_archives_below_the_directory_are_counted(registry: Path, tmp_path: Path) -> None:
    zc.put(nn.Linear(300, 300).eval(), "one")
    model = zc.load("one")
    (path,) = mapped(registry)
    assert path.name == "weights.safetensors"
    assert mapped(tmp_path / "reg") == set()  # as the text begins, and not the directory
    assert model.weight.shape == (300, 300)


def test_one_worker_of_a_machine_looks_for_all(registry: Path) -> None:
    one, other, of_another_cluster = Watch("tcp://a:1"), Watch("tcp://a:1"), Watch("tcp://b:1")
    try:
        assert [found["store"] for found in one.look()] == [f"file:{registry}"]
        assert other.look() == []
        assert len(of_another_cluster.look()) == 1
        assert len(one.look()) == 1
        one.close()
        assert len(other.look()) == 1
        assert one.look() == []
    finally:
        for watch in (one, other, of_another_cluster):
            watch.close()


def test_a_store_that_is_not_opened_says_why(registry: Path) -> None:
    watch = Watch("tcp://a:1")
    with pytest.raises(StoreUnavailable):
        stores.open_store(f"ray:127.0.0.1:1?registry={registry}")
    (told,) = [found for found in watch.look() if found["store"] == "ray:127.0.0.1:1"]
    assert told["holder"].startswith("unavailable: no Ray answers at '127.0.0.1:1'")
    assert not told["healthy"]
    watch.close()
