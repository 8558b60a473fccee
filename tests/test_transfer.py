"""Weights: whatever the spans, the slots and the threads, the same bytes arrive, and no slot is filled too early."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sides import Late

from zcinfer.transfer import Chunk, PinnedSlots, Span, chunks


@st.composite
def spans_in_any_place(draw: Any) -> tuple[list[Span], int, int]:
    """Spans whose targets are apart from each other, with the lengths of source and target."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 600)), max_size=12))
    found, end = [], 0
    for gap, nbytes in pairs:
        source = draw(st.integers(0, 2000))
        found.append(Span(source, end + gap, nbytes))
        end += gap + nbytes
    return draw(st.permutations(found)), 2600, end


@settings(deadline=None, max_examples=60)
@given(spans_in_any_place(), st.integers(1, 5), st.integers(1, 700), st.integers(1, 4))
def test_the_same_bytes_arrive(found: tuple[list[Span], int, int], slots: int, slot_bytes: int, threads: int) -> None:
    spans, source_bytes, target_bytes = found
    source = np.random.default_rng(0).integers(0, 256, source_bytes, np.uint8)
    device = Late()
    target = device.empty(target_bytes)
    PinnedSlots(device, slots, slot_bytes, threads).move(device, source, target, spans)
    for start, place, nbytes in spans:
        np.testing.assert_array_equal(target.numpy()[place : place + nbytes], source[start : start + nbytes])
    assert not device.pending  # all had arrived when it returned


@given(spans_in_any_place(), st.integers(1, 700))
def test_chunks_are_of_no_more_than_a_slot_and_miss_nothing(found: tuple[list[Span], int, int], most: int) -> None:
    spans, _, target_bytes = found
    covered = np.zeros(target_bytes, int)
    end = 0
    for chunk in chunks(spans, most):
        assert 0 < chunk.nbytes <= most
        assert chunk.start >= end  # no byte is written by two copies
        end = chunk.start + chunk.nbytes
        for _, place, nbytes in chunk.spans:
            assert 0 < nbytes <= chunk.nbytes - place
            covered[chunk.start + place : chunk.start + place + nbytes] += 1
    expected = np.zeros(target_bytes, int)
    for _, place, nbytes in spans:
        expected[place : place + nbytes] += 1
    np.testing.assert_array_equal(covered, expected)


def test_neighbours_go_in_one_copy_and_distant_ones_do_not() -> None:
    near, far = [Span(0, 0, 10), Span(300, 256, 10)], [Span(0, 0, 10), Span(300, 266, 10)]
    assert list(chunks(near, 1000)) == [Chunk(0, 266, (Span(0, 0, 10), Span(300, 256, 10)))]
    assert [chunk.start for chunk in chunks(far, 1000)] == [0, 266]


def test_a_slot_is_filled_again_only_after_its_event() -> None:
    device = Late()
    source = np.arange(256, dtype=np.uint8).repeat(40)
    target = device.empty(source.size)
    PinnedSlots(device, slots=3, slot_bytes=100, threads=1).move(device, source, target, [Span(0, 0, source.size)])
    np.testing.assert_array_equal(target.numpy(), source)
    busy: set[int] = set()
    for what, slot in device.told:
        if what == "copy":
            assert slot not in busy
            busy.add(slot)
        else:
            busy.remove(slot)
    assert len({slot for _, slot in device.told}) == 3  # they take turns


def test_a_device_that_does_not_wait_is_caught() -> None:
    # The tests above can fail: with events that say too early that a copy has arrived, other bytes do.
    class Early(Late):
        def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
            super().copy(target, source)
            return Passed()

    class Passed:
        def synchronize(self) -> None:
            pass

    device = Early()
    source = np.arange(200, dtype=np.uint8)
    target = device.empty(source.size)
    PinnedSlots(device, slots=2, slot_bytes=10, threads=1).move(device, source, target, [Span(0, 0, source.size)])
    assert not np.array_equal(target.numpy(), source)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_failure_comes_when_no_copy_is_on_its_way(threads: int, after: int) -> None:
    device = Late(fail_after=after)
    source = np.zeros(1000, np.uint8)
    slots = PinnedSlots(device, slots=3, slot_bytes=10, threads=threads)
    with pytest.raises(RuntimeError, match="the device refuses"):
        slots.move(device, source, device.empty(1000), [Span(0, 0, 1000)])
    assert not device.pending
    # and the slots serve the next
    other = Late()
    target = other.empty(1000)
    slots.move(other, source + 1, target, [Span(0, 0, 1000)])
    assert target.eq(1).all()


def test_two_uploads_at_once_do_not_meet_in_a_slot() -> None:
    device = Late()
    slots = PinnedSlots(device, slots=2, slot_bytes=64, threads=2)
    sources = [np.full(5000, value, np.uint8) for value in (3, 4)]
    targets = [device.empty(5000) for _ in sources]
    together = threading.Barrier(2)

    def upload(number: int) -> None:
        together.wait()
        slots.move(device, sources[number], targets[number], [Span(0, 0, 5000)])

    threads = [threading.Thread(target=upload, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert targets[0].eq(3).all()
    assert targets[1].eq(4).all()
