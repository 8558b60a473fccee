"""Is a block read while another is computed? A timeline of what the threads of a worker do, and what it gives.

A zarr array comes over HTTP from a server on this machine that takes its time for each request, as an object store
does. One worker, which computes on one thread; with one task at a time, and with two, of which one computes.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import dask
import numpy as np
import torch
import zarr
from distributed import Client
from torch import nn

import zcinfer as zc
from zcinfer import telemetry
from zcinfer.nanny import THREAD_VARIABLES
from zcinfer.telemetry import PHASES, Span

from .benchmark import Benchmark, Options, say
from .measure import interleaved, summary
from .tables import Table

WAYS = {1: "one task at a time", 2: "two tasks, of which one computes"}
DELAY, ROWS, BLOCK, WIDTH = 0.04, 24_576, 2_048, 256  # seconds; rows in all and of a block; values of a row
SHOWN = 6  # blocks in the timeline
COLOURS = ("#8fb9c9", "#c9a66b", "#d9d2c5", "#b7a8c9", "#e8e4dc", "#1f6f8b", "#b5c9a8", "#b3541e")


class Handler(SimpleHTTPRequestHandler):
    """Gives files after a while."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(DELAY)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(directory: str) -> Iterator[str]:
    """The URL that a slow server gives a directory."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=directory)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4)).eval()


def measure(options: Options) -> dict[str, Any]:
    """Both ways in turn, each on a cluster of its own; then a timeline of each."""
    rounds = 2 if options.quick else 10
    x = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    with torch.inference_mode():
        expected = model()(torch.from_numpy(x)).numpy()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        stack.enter_context(dask.config.set({"zcinfer.registry": f"{directory}/registry"}))
        zarr.create_array(f"{directory}/x.zarr", data=x, chunks=(BLOCK, WIDTH), compressors=None)
        url = stack.enter_context(served(directory))
        zc.connect("file")
        stack.callback(zc.disconnect)
        zc.put(model(), "model")
        clients = {threads: stack.enter_context(cluster(threads)) for threads in WAYS}

        def run(threads: int) -> None:
            with clients[threads].as_current():
                target = f"{directory}/y{threads}.zarr"
                zc.run("model", f"{url}/x.zarr", target, batch_size=256, resume=False, progress=False)

        say(f"{rounds} rounds")
        seconds = interleaved({way: partial(run, threads) for threads, way in WAYS.items()}, rounds)
        spans = {}
        for threads, way in WAYS.items():
            clients[threads].run(begin_trace)
            run(threads)
            (found,) = clients[threads].run(end_trace).values()
            spans[way] = found
            assert np.allclose(zarr.open_array(f"{directory}/y{threads}.zarr")[:], expected, atol=1e-5)
    return {
        "rows": ROWS,
        "block": BLOCK,
        "delay": DELAY,
        "seconds": {way: summary(times) for way, times in seconds.items()},
        "spans": spans,
    }


@contextmanager
def cluster(threads: int) -> Iterator[Client]:
    """One worker that computes on one thread."""
    with (
        zc.LocalCluster(n_workers=1, threads_per_worker=threads, env=dict.fromkeys(THREAD_VARIABLES, "1")) as made,
        Client(made, set_as_default=False) as client,
    ):
        yield client


def begin_trace(dask_worker: Any) -> None:
    dask_worker.zcinfer_trace = ExitStack()
    dask_worker.zcinfer_spans = dask_worker.zcinfer_trace.enter_context(telemetry.trace())


def end_trace(dask_worker: Any) -> list[list[Any]]:
    dask_worker.zcinfer_trace.close()
    return [list(span) for span in dask_worker.zcinfer_spans]


def tables(results: Mapping[str, Any]) -> list[Table]:
    one, two = (results["seconds"][way] for way in WAYS.values())
    rows = [
        [way, found, results["rows"] / found["median"], one["median"] / found["median"], busy(results["spans"][way])]
        for way, found in zip(WAYS.values(), (one, two), strict=True)
    ]
    columns = {"": "", "time": "ms", "speed": "rows/s", "ratio": "x", "share of time computing": "%"}
    return [Table("A job from a slow source", columns, rows)]


def busy(spans: list[list[Any]]) -> float:
    """Percent of the time of a job in which some thread computed."""
    found = [Span(*span) for span in spans]
    computing = sum(span.end - span.begin for span in found if span.phase == "computing")
    return 100 * computing / (max(span.end for span in found) - min(span.begin for span in found))


def figures(results: Mapping[str, Any]) -> list[Any]:
    return [timeline(way, [Span(*span) for span in spans]) for way, spans in results["spans"].items()]


def timeline(way: str, spans: list[Span]) -> Any:
    """What each thread did when, in the first blocks."""
    from bokeh.models import ColumnDataSource, Legend, LegendItem
    from bokeh.plotting import figure

    blocks = list(dict.fromkeys(span.where for span in sorted(spans, key=lambda span: span.begin)))[:SHOWN]
    shown = [span for span in spans if span.where in blocks]
    begin = min(span.begin for span in shown)
    threads = {thread: f"thread {n + 1}" for n, thread in enumerate(dict.fromkeys(span.thread for span in shown))}
    lanes = list(threads.values())
    plot = figure(
        title=f"{way}: the first {len(blocks)} blocks", y_range=lanes[::-1], width=900, height=140 + 60 * len(lanes),
        x_axis_label="ms", toolbar_location=None,
    )  # fmt: skip
    items = []
    for phase, colour in zip(PHASES, COLOURS, strict=True):
        those = [span for span in shown if span.phase == phase]
        if not those:
            continue
        bars = plot.hbar(
            y="lane", left="left", right="right", height=0.6, color=colour,
            source=ColumnDataSource({
                "lane": [threads[span.thread] for span in those],
                "left": [(span.begin - begin) * 1e3 for span in those],
                "right": [(span.end - begin) * 1e3 for span in those],
            }),
        )  # fmt: skip
        items.append(LegendItem(label=phase.replace("_", " "), renderers=[bars]))
    names = [min((s for s in shown if s.where == block), key=lambda span: span.begin) for block in blocks]
    plot.text(
        x=[(span.begin - begin) * 1e3 for span in names], y=[threads[span.thread] for span in names],
        text=[span.where for span in names], y_offset=-22, text_font_size="11px", text_baseline="bottom",
    )  # fmt: skip
    plot.add_layout(Legend(items=items, orientation="horizontal", border_line_color=None), "below")
    plot.ygrid.grid_line_color = None
    plot.x_range.start = 0
    return plot


BENCHMARK = Benchmark(
    "overlap",
    "Reading while computing",
    f"A zarr array over HTTP from a server that takes {DELAY * 1e3:.0f} ms for each request; one worker that computes "
    "on one thread; the whole job, written to zarr. In turn, on clusters that stay up; outputs are compared with plain "
    "torch. The timelines are of one more run each. *What it does not show:* sources as fast as the disk, where there "
    "is little to overlap.",
    measure,
    tables,
    figures,
)
