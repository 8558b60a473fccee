"""Two architectures of each module of timm, small and random, go through the store and come back as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from zoo.sweep import Summary, by_all_cores
from zoo.vision import CHOSEN, PLACE

FEWEST = 150


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not (PLACE.exists() or find_spec("timm")),
    reason="timm is not installed: `make test-slow` puts it and torchvision into a directory of their own",
)
def test_models_of_timm_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    came_of = by_all_cores("zoo.vision", tmp_path)
    summary = Summary("timm", came_of)
    record_property("timm", summary.text)
    with capsys.disabled():
        print(f"\n{summary.text}")
    assert not summary.wrong, summary.why
    assert len(summary.refused) < summary.built / 100, summary.why
    assert summary.built >= FEWEST, came_of
    assert len(came_of) == len(json.loads(CHOSEN.read_text()))
    assert summary.by_output >= summary.built * 0.95, came_of
