"""Hundreds of model classes of transformers, tiny and random, go through the store and come back as they were."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from zcinfer.parts import join, split
from zoo import tiny
from zoo.compare import buffer_of, compared, round_trip, state_of
from zoo.samples import TOKENS
from zoo.sweep import Summary, through_the_store

FEWEST = 200


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformers without its warnings and the network, and torch on one thread: more only wait for these models."""
    import transformers

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("registry", "quiet")
def test_models_of_transformers_come_back(
    capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    came_of = {name: through_the_store(partial(tiny.build, name), tiny.guesses) for name in tiny.classes()}
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
