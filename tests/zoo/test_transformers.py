"""Hundreds of model classes of transformers, tiny and random, go through the store and come back as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zcinfer.parts import join, split
from zoo.compare import buffer_of, compared, round_trip, state_of
from zoo.samples import TOKENS
from zoo.sweep import Summary, by_all_cores

FEWEST = 200


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_models_of_transformers_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    came_of = by_all_cores("zoo.tiny", tmp_path)
    summary = Summary("transformers", came_of)
    record_property("transformers", summary.text)
    with capsys.disabled():
        print(f"\n{summary.text}")
    assert not summary.wrong, summary.why
    assert len(summary.refused) < summary.built / 100, summary.why
    assert summary.built >= FEWEST, came_of
    assert summary.by_output >= summary.built / 2, came_of


def bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ).eval()


def test_a_model_of_transformers_comes_back() -> None:
    model = bert()
    before = state_of(model)
    parts = split(model)
    copy = join(parts.skeleton, parts.description, buffer_of(parts))
    assert state_of(model) == before
    assert compared(model, copy, (TOKENS,)) == []
    assert split(copy).description.digest == parts.description.digest


def test_a_model_of_transformers_that_was_called_comes_back() -> None:
    model = bert()
    expected = model(TOKENS, output_hidden_states=True).hidden_states  # leaves hooks behind
    found = round_trip(model)(TOKENS, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    assert all(map(torch.equal, found, expected))
