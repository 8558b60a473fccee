"""The examples run as they stand, and what they say is true: their answers beside plain NumPy and torch."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import dask
import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

import zcinfer as zc
from zcinfer import catalog, loading
from zcinfer.rows import Array

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "gravitational_waves.py"
DATA = "gwpy/testing/data"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Run(NamedTuple):
    """What a run of the example printed, drew and published."""

    printed: str
    drawn: dict[str, list[Array]]
    registry: Path


@pytest.fixture(scope="module")
def data() -> Path:
    try:
        return Path(str(distribution("gwpy").locate_file(DATA)))
    except PackageNotFoundError:
        pytest.skip("gwpy is not installed: make test-slow, or pip install --no-deps -r requirements-example.txt")


@pytest.fixture(scope="module")
def example(data: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gravitational_waves", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    directory = tmp_path_factory.mktemp("example")
    environment = {**os.environ, "DASK_ZCINFER__REGISTRY": str(directory / "registry")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "plot.html"],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (directory / "plot.html").read_text()
    assert not re.findall(r'<(?:script|link)[^>]*(?:src|href)="http', page)
    with dask.config.set({"zcinfer.registry": str(directory / "registry")}):
        catalog.connect(f"file:{directory / 'registry'}")
        yield Run(done.stdout, dict(lines(page)), directory / "registry")
        catalog.disconnect()
        loading.residents.clear()


def lines(page: str) -> Iterator[tuple[str, list[Array]]]:
    """The title of each figure of a Bokeh page, and ``(2, points)`` of each of its glyphs."""
    (found,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    (document,) = json.loads(found).values()
    (root,) = document["roots"]
    for child in root["attributes"]["children"]:
        if child["name"] == "Figure":
            glyphs = [renderer["attributes"] for renderer in child["attributes"]["renderers"]]
            columns = [dict(glyph["data_source"]["attributes"]["data"]["entries"]) for glyph in glyphs]
            yield (
                child["attributes"]["title"]["attributes"]["text"],
                [np.stack([numbers(c["x"]), numbers(c["y"])]) for c in columns],
            )


def numbers(column: Any) -> Array:
    raw = gzip.decompress(base64.b64decode(column["array"]["data"]))
    return np.frombuffer(raw, column["dtype"]).reshape(column["shape"])


def test_the_answers_are_those_of_plain_torch_on_windows_of_numpy(run: Run, example: ModuleType) -> None:
    taps = example.whitening(example.simulated(np.random.default_rng(0), 64))
    names, strain = example.recorded()
    chirp = example.chirp(np.arange(16_384) / 16_384 - 0.6, mass=12, distance=40, phase=1)
    model = zc.load("chirp-finder")
    assert list(run.drawn) == names == ["H1", "L1", "V1"]
    for name, channel in zip(names, strain, strict=True):
        highest = []
        for x, drawn in zip((channel, channel + chirp), run.drawn[name], strict=False):
            white = np.convolve(x, taps)[: len(x)].astype("float32")  # one sum for each sample, and no transform
            rows = sliding_window_view(white, 2048)[4096::32]
            with torch.no_grad():
                answers = model(torch.from_numpy(rows.copy())).numpy()
            times = (4096 + 32 * np.arange(len(rows)) + 1536 - 2047) / 16_384
            assert np.allclose(drawn[0], times)
            assert np.allclose(drawn[1], answers, atol=2e-3)
            highest.append(f"{answers.max():.1f} at {times[answers.argmax()]:.3f} s")
        printed = re.findall(rf"^  {name} +(-?[\d.]+ at [\d.]+ s) +(-?[\d.]+ at [\d.]+ s)", run.printed, re.MULTILINE)
        assert printed == [tuple(highest)]


def test_each_detector_answers_to_the_chirp_when_it_merges(run: Run) -> None:
    for name, (before, after, peak) in run.drawn.items():
        assert after[1].max() > before[1].max(), name
        assert abs(after[0, after[1].argmax()] - 0.6) < 0.01, name
        assert np.array_equal(peak[:, 0], after[:, after[1].argmax()])
        early = after[0] < 0.3  # windows, and samples that the filter sees, before the chirp is in the band
        assert np.allclose(before[1, early], after[1, early], atol=0.05)


def test_a_matched_filter_finds_the_chirp_at_the_same_time_and_nothing_without(example: ModuleType) -> None:
    rate, taps = 16_384, example.whitening(example.simulated(np.random.default_rng(0), 64))
    _, strain = example.recorded()
    t = np.arange(rate) / rate
    for loud, x in ((False, strain), (True, strain + example.chirp(t - 0.6, mass=12, distance=40, phase=1))):
        # Both quadratures of the wave, from 1/8 s before its merger on, against what the filter makes of the strain.
        waves = [np.convolve(example.chirp(t - 0.5, 12, 40, phase), taps)[2047:] for phase in (0, np.pi / 2)]
        templates = [wave[rate * 3 // 8 : rate // 2 + 512] for wave in waves]
        for channel in x:
            white = np.convolve(channel, taps)[4095:rate]
            ratio = np.hypot(*(np.correlate(white, template) for template in templates))
            merger = (np.arange(len(ratio)) + 4095 - 2047 + rate // 8) / rate
            beside = abs(merger - 0.6) > 0.1
            ratio /= np.sqrt(np.mean(ratio[beside] ** 2) / 2)
            assert ratio[beside].max() < 5
            assert (ratio.max() > 7) == loud
            assert not loud or abs(merger[ratio.argmax()] - 0.6) < 0.001


def test_the_hardware_injection_merges_after_this_second_and_is_below_the_band(data: Path, example: ModuleType) -> None:
    # Triggers that a search found in ten seconds of H1, from the same start; the package has their list.
    table = gzip.decompress((data / "H1-LDAS_STRAIN-968654552-10.xml.gz").read_bytes()).decode()
    found = re.findall(r'"H1",(\d+),(\d+),.*,"LDAS-STRAIN",[^,]+,[^,]+,([^,]+),', table)
    second, part, confidence = np.array(found, float).T
    loudest = confidence.argmax()
    assert len(found) > 1000
    assert 5.8 < second[loudest] - 968654552 + part[loudest] / 1e9 < 6.1
    # Chirp mass 4.8: cycles in this second, and what the textbook has (Maggiore, equation 4.20).
    wave = example.chirp(np.linspace(-5.95, -4.95, 16_384), mass=4.8, distance=36, phase=0)
    cycles = np.count_nonzero(np.diff(np.signbit(wave))) / 2
    expected = [134 * (1.21 / 4.8) ** (5 / 8) * left ** (-3 / 8) for left in (5.95, 4.95)]
    assert expected[0] - 1 < cycles < expected[1] + 1
    assert max(expected) < 32


def test_the_filter_makes_other_noise_of_the_kind_white_in_its_band_and_keeps_nothing_else(example: ModuleType) -> None:
    rate, taps = 16_384, example.whitening(example.simulated(np.random.default_rng(0), 64))
    white = np.convolve(example.simulated(np.random.default_rng(1), 16), taps, "valid")
    power = np.abs(np.fft.rfft(white)) ** 2 / len(white)  # 1, were it white everywhere
    f = np.fft.rfftfreq(len(white), 1 / rate)
    for low in range(100, 280, 20):
        assert 0.85 < power[(f >= low) & (f < low + 20)].mean() < 1.15, low
    gain, f = np.abs(np.fft.rfft(taps, 2**18)), np.fft.rfftfreq(2**18, 1 / rate)
    assert gain[f < 45].max() < 1e-6 * gain.max()  # seismic noise is 10^5 louder than what is listened to
    assert gain[(f < 58) | (f > 330)].max() < 1e-5 * gain.max()
