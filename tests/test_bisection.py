"""Bisection: every bad row is found, every other row is computed once and as it would have been, in few calls."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcinfer.bisection import Failed, Salvage, TooManyFailed, salvage
from zcinfer.errors import BlockError, InputError


class Model:
    """Computes rows batch by batch; some rows are bad, some are only together with certain others."""

    def __init__(self, batch_rows: int, bad: set[int], pairs: set[tuple[int, int]] = frozenset()) -> None:  # type: ignore[assignment]
        self.batch_rows, self.bad, self.pairs = batch_rows, bad, pairs
        self.calls: list[tuple[int, int]] = []

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """The first and the last row of each row's batch."""
        self.calls.append((start, stop))
        result = np.empty((stop - start, 2), int)
        for first in range(start, stop, self.batch_rows):
            batch = range(first, min(first + self.batch_rows, stop))
            for row in batch:
                if row in self.bad:
                    raise BlockError(f"row {row} is bad\nand more")
            for one, other in self.pairs:
                if one in batch and other in batch:
                    raise BlockError(f"rows {one} and {other} do not go together")
            result[batch.start - start : batch.stop - start] = batch[0], batch[-1]
        return result


def plain(rows: int, batch_rows: int) -> np.ndarray:
    return Model(batch_rows, set())(0, rows)


def whole(found: Salvage[np.ndarray], rows: int) -> np.ndarray:
    """What was computed; -1 where nothing was. No row may have been computed twice."""
    result = np.full((rows, 2), -1)
    for start, stop, part in found.parts:
        assert (result[start:stop] == -1).all()
        assert len(part) == stop - start
        result[start:stop] = part
    return result


sizes = st.integers(1, 300).flatmap(
    lambda rows: st.tuples(st.just(rows), st.integers(1, 64), st.sets(st.integers(0, rows - 1), max_size=12))
)


@given(sizes)
def test_bad_rows_are_found_and_all_others_are_computed(drawn: tuple[int, int, set[int]]) -> None:
    rows, batch_rows, bad = drawn
    model = Model(batch_rows, bad)
    found = salvage(model, rows, batch_rows, most=rows)
    assert [(f.start, f.stop, f.error, f.together) for f in found.failed] == [
        (row, row + 1, f"row {row} is bad", False) for row in sorted(bad)
    ]
    result, expected = whole(found, rows), plain(rows, batch_rows)
    assert set(np.flatnonzero(result[:, 0] == -1)) == bad
    # Batches without a bad row are those of a plain run.
    untouched = [not bad & {*range(first, last + 1)} for first, last in expected]
    assert np.array_equal(result[untouched], expected[untouched])


@given(sizes)
def test_calls_are_few(drawn: tuple[int, int, set[int]]) -> None:
    rows, batch_rows, bad = drawn
    model = Model(batch_rows, bad)
    salvage(model, rows, batch_rows, most=rows)
    halvings = math.ceil(math.log2(-(-rows // batch_rows))) + math.ceil(math.log2(min(rows, batch_rows)))
    assert len(model.calls) <= 1 + 2 * len(bad) * halvings
    assert len(set(model.calls)) == len(model.calls)


@given(sizes, st.data())
def test_rows_that_fail_only_together_are_kept(drawn: tuple[int, int, set[int]], data: st.DataObject) -> None:
    rows, batch_rows, bad = drawn
    row = st.integers(0, rows - 1)
    pairs = data.draw(st.sets(st.tuples(row, row).filter(lambda pair: pair[0] < pair[1]), max_size=5))
    found = salvage(Model(batch_rows, bad, pairs), rows, batch_rows, most=3 * rows)
    assert {f.start for f in found.failed if not f.together} == bad
    result = whole(found, rows)
    assert set(np.flatnonzero(result[:, 0] == -1)) == bad
    for f in found.failed:
        if f.together:
            one, other = map(int, f.error.removeprefix("rows ").removesuffix(" do not go together").split(" and "))
            assert (one, other) in pairs
            assert f.start <= one < other < f.stop
    for one, other in pairs - {pair for pair in pairs if bad & {*pair}}:
        assert not result[one, 0] <= other <= result[one, 1]  # they went apart


def test_rows_that_failed_together_are_told_as_the_least_part_that_did() -> None:
    found = salvage(Model(8, {12}, {(1, 3)}), 16, 8, most=2)
    assert [(f.start, f.stop, f.together) for f in found.failed] == [(0, 4, True), (12, 13, False)]
    assert found.failed[0].error == "rows 1 and 3 do not go together"
    assert [(start, stop) for start, stop, _ in found.parts] == [(0, 2), (2, 4), (4, 8), (8, 12), (13, 14), (14, 16)]


def test_what_works_at_once_is_one_call() -> None:
    model = Model(4, set())
    found = salvage(model, 100, 4, most=0)
    assert model.calls == [(0, 100)]
    assert found.failed == []


def test_no_rows() -> None:
    assert len(salvage(Model(4, set()), 0, 4, most=0).parts[0][2]) == 0


@given(st.integers(1, 200), st.integers(1, 64), st.integers(0, 20))
def test_too_many_stop_it(rows: int, batch_rows: int, most: int) -> None:
    model = Model(batch_rows, {*range(rows)})
    if rows <= most:
        assert len(salvage(model, rows, batch_rows, most).failed) == rows
        return
    with pytest.raises(TooManyFailed) as caught:
        salvage(model, rows, batch_rows, most)
    assert [f.start for f in caught.value.failed] == [*range(most + 1)]
    assert len(model.calls) <= 1 + 2 * (most + 1) * (math.ceil(math.log2(rows)) + 1)


def test_traceback_is_whole_and_names_the_cause() -> None:
    def broken_layer() -> None:
        raise ValueError("that is no index")

    def compute(start: int, stop: int) -> None:
        try:
            broken_layer()
        except ValueError as error:
            raise BlockError(f"rows {start}–{stop - 1}: no index\nin detail") from error

    (failed,) = salvage(compute, 1, 1, most=1).failed
    assert failed.error == "rows 0–0: no index"
    assert "in broken_layer" in failed.traceback
    assert "ValueError: that is no index" in failed.traceback
    assert failed.traceback.endswith("in detail\n")


def test_other_errors_and_hopeless_ones_are_raised() -> None:
    def other(start: int, stop: int) -> None:
        raise InputError("the lengths differ")

    def lost(start: int, stop: int) -> None:
        calls.append(start)
        raise BlockError("the device is lost")

    calls: list[int] = []
    with pytest.raises(InputError):
        salvage(other, 8, 4, most=100)
    with pytest.raises(BlockError, match="the device is lost"):
        salvage(lost, 8, 4, most=100, hopeless=lambda error: "lost" in str(error))
    assert calls == [0]


def test_failures_hold_no_memory_of_what_failed() -> None:
    class Activations:
        pass

    held = []

    def compute(start: int, stop: int) -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise BlockError("bad")

    found = salvage(compute, 4, 2, most=10)
    gc.collect()
    assert len(found.failed) == 4
    assert all(isinstance(failed, Failed) for failed in found.failed)
    assert not any(reference() for reference in held)
