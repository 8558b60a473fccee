"""Slide a small network over real strain of LIGO and Virgo, and see where it answers to a chirp.

    make example                                                      # or, where zcinfer is installed:
    pip install bokeh h5py && pip install --no-deps gwpy==4.1.0 && python examples/gravitational_waves.py [plot.html]

**The data.** The package gwpy carries one second of strain of three detectors, at 16,384 Hz, of 16 September 2010.
That day's *hardware injection* is well known: mirrors were moved as a wave would have moved them (GW100916, the "Big
Dog"; Abadie et al., Phys. Rev. D 85, 082002). This second does not show it. It ends 5 s before the injected merger, and
the injected wave (chirp mass 4.8 suns: Aasi et al., Phys. Rev. D 88, 062001) is still at 30 Hz, where noise drowns it.
So this is real noise, and the chirp to be found is *added here, in software*.

**The chirp** is the inspiral of two equal masses, face on, to leading (Newtonian) order (Maggiore, Gravitational Waves,
vol. 1, section 4.1). From the innermost stable orbit on, where that formula ends, it keeps its pitch and dies out.

**The network** has met simulated noise only: Gaussian, of the design sensitivity of initial LIGO (Damour, Iyer and
Sathyaprakash, Phys. Rev. D 63, 044023), with a steady tone in it, since real detectors hum. All three detectors are
whitened by the spectrum of that simulated noise, and not by their own.

**What it shows:** a network that knows simulations alone finds a loud chirp in real noise of three detectors, and when.
**What it does not:** how often it is wrong (one second gives no false-alarm rate), how faint a chirp it finds, or what
real signals do, which reach each detector at a time and a strength of its own; here the same is added to all three.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from time import perf_counter
from typing import Any

import dask.array as da
import h5py
import numpy as np
import torch
from bokeh.layouts import column
from bokeh.models import Div, Span
from bokeh.plotting import figure, output_file, save
from bokeh.resources import INLINE
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

import zcinfer as zc

Array = np.ndarray[Any, np.dtype[Any]]

RATE = 16_384  # samples a second
WINDOW, STEP = RATE // 8, RATE // 512
BAND = 80, 300  # Hz, all that the network hears: below is seismic noise and mains at 60 Hz, above are suspension wires
TAPS = RATE // 4 - 1  # of the whitening filter: it looks back 1/4 s, and so is LATE by 1/8 s
LATE = TAPS // 2
PLACE, WIDTH = WINDOW * 3 // 4, RATE // 128  # where in a window a merger counts, give or take

MASSES = 8, 16  # chirp masses (suns) that the network learns
ADDED = {"mass": 12, "distance": 40, "phase": 1}  # the chirp that is added: suns, megaparsecs, radians
MERGER = 0.6  # when, in seconds of the data
SUN, MEGAPARSEC = 4.9255e-6, 1.0293e14  # both in seconds: G M / c^3, and 1 Mpc / c


def recorded() -> tuple[list[str], Array]:
    """The detectors' names, and their strain ``(detectors, time)``."""
    try:
        path = distribution("gwpy").locate_file("gwpy/testing/data/HLV-HW100916-968654552-1.hdf")
    except PackageNotFoundError:
        sys.exit("The strain is in the package gwpy, of which no more is needed: pip install --no-deps gwpy==4.1.0")
    with h5py.File(str(path)) as file:
        return [name[:2] for name in file], np.stack([channel[:] for channel in file.values()])


def chirp(t: Array, mass: float, distance: float, phase: float) -> Array:
    """Strain at times ``t`` (s) after the merger; chirp mass in suns, distance in megaparsecs, phase in radians."""
    m = mass * SUN
    last = 1 / (6**1.5 * np.pi * m * 2**1.2)  # Hz, at the innermost stable orbit of two equal masses
    left = 5 * m * (8 * np.pi * m * last) ** (-8 / 3)  # s, from that orbit to the merger
    inspiral, after = np.maximum(-t, left) / (5 * m), np.maximum(t + left, 0)
    angle = phase - 2 * inspiral**0.625 + 2 * np.pi * last * after
    strain: Array = m / (distance * MEGAPARSEC) * inspiral**-0.25 * np.exp(-after * last / 2) * np.cos(angle)
    return strain


def simulated(rng: np.random.Generator, seconds: int) -> Array:
    """Gaussian noise of initial LIGO's design; its wall of seismic noise is cut off at 40 Hz."""
    x = np.maximum(np.fft.rfftfreq(seconds * RATE, 1 / RATE), 40) / 150
    density = 9e-46 * ((4.49 * x) ** -56 + 0.16 * x**-4.52 + 0.52 + 0.32 * x**2)  # strain^2 / Hz
    white = np.fft.rfft(rng.standard_normal(seconds * RATE))
    return np.fft.irfft(white * np.sqrt(density * RATE / 2))


def whitening(noise: Array) -> Array:
    """Taps of a filter that keeps `BAND` and makes such noise white in it, by the noise's own spectrum."""
    pieces, taper = sliding_window_view(noise, TAPS + 1)[:: LATE + 1], np.hanning(TAPS + 1)
    power = np.mean(np.abs(np.fft.rfft(pieces * taper)) ** 2, axis=0) / np.sum(taper**2)  # Welch's method
    f = np.fft.rfftfreq(TAPS + 1, 1 / RATE)
    taps = np.roll(np.fft.irfft(np.where((f >= BAND[0]) & (f <= BAND[1]), 1 / np.sqrt(power), 0)), LATE)[:TAPS]
    return taps * np.kaiser(TAPS, 14)  # seismic noise is 10^5 times as loud as what is listened to


def whiten(segment: Array, history: int, taps: Array) -> Array:
    """The filter's output from the sample ``history`` on, ``(..., time)``: what `zc.windows` wants of each block."""
    n = segment.shape[-1]
    found = np.fft.irfft(np.fft.rfft(segment, n + TAPS) * np.fft.rfft(taps, n + TAPS), n + TAPS)
    return found[..., history:n].astype("float32")


class Finder(nn.Module):
    """Of windows ``(rows, ..., time)`` the log-odds ``(rows, ...)`` that a merger is at `PLACE`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.AvgPool1d(16), nn.InstanceNorm1d(1)),  # 1,024 Hz are enough for the band; loudness must not count
            *(nn.Conv1d(1, 32, 32, stride=2), nn.ReLU(), nn.Conv1d(32, 32, 8, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 21, 1)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(x.reshape(-1, 1, WINDOW))
        return found.reshape(x.shape[:-1])


def lessons(rng: np.random.Generator, noise: Array, taps: Array, rows: int = 128) -> Iterator[tuple[Array, Array]]:
    """Whitened windows ``(rows, time)``, and for each whether a merger is at `PLACE`; without end."""
    noise = sliding_window_view(whiten(noise, TAPS, taps), WINDOW)
    middle, time = WINDOW * 5 // 4, np.arange(WINDOW) / RATE
    t = (np.arange(2 * WINDOW + TAPS) - TAPS + LATE - middle) / RATE
    waves = np.stack([chirp(t, rng.uniform(*MASSES), 1, rng.uniform(0, 2 * np.pi)) for _ in range(256)])
    waves = sliding_window_view(whiten(waves, TAPS, taps), WINDOW, axis=-1)
    while True:
        kind = rng.integers(4, size=rows)  # 0, 1: a merger at the place; 2: one beside it; 3: none
        beside = rng.choice([-1, 1], rows) * rng.uniform(3 * WIDTH, WINDOW / 2, rows)
        at = PLACE + np.where(kind < 2, rng.uniform(-WIDTH, WIDTH, rows), beside).astype(int)
        wave = waves[rng.integers(len(waves), size=rows), middle - at]
        wave *= rng.uniform(6, 20, (rows, 1)) / np.linalg.norm(wave, axis=1, keepdims=True)  # signal to noise
        wave[kind == 3] = 0
        pitch, phase = rng.uniform(*BAND, (rows, 1)), rng.uniform(0, 2 * np.pi, (rows, 1))
        tone = rng.exponential(0.1, (rows, 1)) * np.sin(2 * np.pi * pitch * time + phase)
        x = noise[rng.integers(len(noise), size=rows)] + wave + tone
        yield x.astype("float32"), (kind < 2).astype("float32")


def trained(rng: np.random.Generator, noise: Array, taps: Array, steps: int = 250) -> Finder:
    """A network that has had so many lessons."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small a network gains nothing from more
    model = Finder()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _, (x, y) in zip(range(steps), lessons(rng, noise, taps), strict=False):
        loss = nn.functional.binary_cross_entropy_with_logits(model(torch.from_numpy(x)), torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def plot(name: str, time: Array, before: Array, after: Array) -> Any:
    """The answers of one detector over time (s): as recorded, and with the chirp."""
    p = figure(title=name, width=900, height=230, y_range=(-17, 21), tools="xpan,xwheel_zoom,box_zoom,reset")
    p.xaxis.axis_label, p.yaxis.axis_label = "time of a merger (s)", "log-odds"
    p.add_layout(Span(location=MERGER, dimension="height", line_dash="dashed", line_color="#888888"))
    p.line(time, before, color="#9aa5ab", line_width=1.5, legend_label="as recorded")
    p.line(time, after, color="#1f6f8b", line_width=2.5, legend_label="with the chirp")
    p.scatter(time[[after.argmax()]], after[[after.argmax()]], size=10, color="#c8553d", legend_label="its peak")
    p.legend.location, p.legend.orientation = "top_left", "horizontal"
    return p


def main(path: str = "gravitational_waves.html") -> None:
    """Train, publish, slide, plot."""
    began = perf_counter()
    names, strain = recorded()
    rng = np.random.default_rng(0)
    noise = simulated(rng, seconds=64)
    taps = whitening(noise)
    model = trained(rng, noise, taps)
    print(f"{perf_counter() - began:4.1f} s  the network has learnt from simulated noise and chirps")

    added = chirp(np.arange(RATE) / RATE - MERGER, **ADDED)
    both = da.from_array(np.stack([strain, strain + added]), chunks=(2, 3, RATE // 4))
    windows = zc.windows(both, WINDOW, STEP, history=TAPS, prepare=partial(whiten, taps=taps), dtype="float32")
    # A second needs no cluster. A year does: with zc.LocalCluster() as cluster, cluster.get_client(): ...
    zc.connect("file")  # one process shares its model with no other, and needs no Ray
    zc.put(model, "chirp-finder")
    answers = zc.predict("chirp-finder", windows, batch_size=64).compute()  # (windows, 2, detectors)
    print(f"{perf_counter() - began:4.1f} s  it has answered for {windows}")

    early = -(-TAPS // STEP)  # windows that begin before the filter has looked back its 1/4 s
    time = (np.arange(early, len(windows)) * STEP - LATE + PLACE) / RATE  # of the merger that each window is asked for
    print("\nAdded: chirp mass {mass} suns, {distance} Mpc away;".format(**ADDED), f"it merges at {MERGER} s.")
    print("Highest log-odds of a merger:  as recorded      with the chirp")
    plots = []
    for i, name in enumerate(names):
        before, after = answers[early:, :, i].T
        found = time[after.argmax()]
        print(f"  {name} {before.max():30.1f} at {time[before.argmax()]:.3f} s", end="")
        print(f"{after.max():7.1f} at {found:.3f} s ({1e3 * (found - MERGER):+.0f} ms)")
        plots.append(plot(name, time, before, after))

    output_file(path, title="A chirp in real noise")
    save(column(Div(text=CAPTION), *plots), resources=INLINE)
    print(
        f"\n{perf_counter() - began:4.1f} s  the plot is in {path}; the model stays published (zcinfer rm chirp-finder)"
    )


CAPTION = """<h2>A chirp in one second of real noise</h2><p style="width: 860px">How a network that has met simulated
noise only answers to windows of 1/8 s of three detectors (16 September 2010, 06:42:17 UTC), as they were recorded and
with a chirp added in software, which merges at the dashed line. One second gives no rate of false alarms.</p>"""

if __name__ == "__main__":
    main(*sys.argv[1:])
