"""A block cut into batches: which rows go together, and what is done when they do not fit into memory.

Batches begin at multiples of the batch size from the block's first row, so that a chunking and a batch size determine
the result to the last bit. Not for how the model is called (`calling`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .errors import InputError, SettingsError
from .rows import Array, Rows, rows_of

Index = slice | Array
MASK = "attention_mask"


def cut(rows: int, batch_size: int, order: Array | None = None) -> Iterator[Index]:
    """Rows of each batch."""
    for start in range(0, rows, batch_size):
        stop = min(start + batch_size, rows)
        yield slice(start, stop) if order is None else order[start:stop]


def mask_of(inputs: Sequence[Rows], names: Sequence[str], sort_by: str) -> int:
    """Number of the input that says how long rows are.

    Raises
    ------
    SettingsError, InputError
        There is none of that name, or it is no mask of tokens.
    """
    wanted = MASK if sort_by == "length" else sort_by
    if wanted not in names:
        raise SettingsError(
            f"sort_by={sort_by!r} needs an input by the name {wanted!r}, found {', '.join(names) or 'none'}: name the "
            "input that is not zero where a row has tokens, as in sort_by='attention_mask'"
        )
    number = len(inputs) - len(names) + list(names).index(wanted)
    if len(inputs[number].shape) != 1:
        raise InputError(f"{wanted!r} is {inputs[number]}: rows are sorted by a mask of shape (rows, tokens)")
    return number


class Lengths:
    """Lengths of the rows of a block of padded tokens.

    Rows of like length go into one batch, and each batch is cut to its longest row. What a row's result is does not
    depend on the order; that padding is shorter can change its last bits.

    Parameters
    ----------
    blocks : sequence of numpy.ndarray
    names : sequence of str
        Of the last of them.
    sort_by : str
        "length", or the name of the input that is not zero where a row has tokens.
    """

    def __init__(self, blocks: Sequence[Array], names: Sequence[str], sort_by: str):
        mask = blocks[mask_of(list(map(rows_of, blocks)), names, sort_by)]
        self.full = mask.shape[1]
        reversed_mask = mask[:, ::-1] != 0
        # Up to the last token: what is padded on the left stays so.
        self.lengths = np.where(reversed_mask.any(axis=1), self.full - reversed_mask.argmax(axis=1), 1)
        self.order: Array = np.argsort(-self.lengths, kind="stable")  # longest first: what does not fit is met at once

    def trimmed(self, batch: Sequence[Array], rows: Index) -> tuple[list[Array], tuple[int, int]]:
        """The rows, no longer than they need be, and the lengths that they have and had."""
        length = int(self.lengths[rows].max()) if self.full else 0
        cut = [array[:, :length] if array.ndim > 1 and array.shape[1] == self.full else array for array in batch]
        return cut, (length, self.full)


def in_halves(
    run: Callable[[Index], None],
    rows: Index,
    most: Callable[[], int | None],
    is_too_large: Callable[[Exception], bool],
    told: Callable[[int], None],
) -> None:
    """Run a batch, in halves where it is too large.

    Parameters
    ----------
    run : callable
        Runs such rows, from cutting them out to putting their outputs in place.
    rows : slice or numpy.ndarray
        The batch's.
    most : callable
        More rows than it gives are known to be too many.
    is_too_large : callable
        Whether an error means that.
    told : callable
        Called with the number of rows that were too many; `most` knows from then on.
    """
    count, known = _count(rows), most()
    if known is None or count <= known:
        try:
            return run(rows)
        except Exception as error:
            if count == 1 or not is_too_large(error):
                raise
            error.__traceback__ = None  # it holds the tensors that did not fit
        told(count)
    # The same cuts whatever was known before: halves of the batch, and not as many rows as would fit.
    half = (count + 1) // 2
    for part in _parts(rows, half):
        in_halves(run, part, most, is_too_large, told)


def _count(rows: Index) -> int:
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)


def _parts(rows: Index, first: int) -> tuple[Index, Index]:
    """The first so many rows, and the others."""
    if isinstance(rows, slice):
        middle = rows.start + first
        return slice(rows.start, middle), slice(middle, rows.stop)
    return rows[:first], rows[first:]


def name_of(rows: Index, first_row: int | None) -> str:
    """What to call some rows in errors."""
    if isinstance(rows, slice):
        start, stop = rows.start, rows.stop
        if first_row is None:
            return f"{start:,}–{stop - 1:,} of the block"
        return f"{first_row + start:,}–{first_row + stop - 1:,}"
    first: Any = first_row or 0
    listed = ", ".join(f"{first + row:,}" for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    return listed if first_row is not None else f"{listed} of the block"
