"""``zcinfer demo``: a real model over real text on several workers that share its weights, measured and checked.

Everything printed is measured in the run that prints it. The job itself is what a user would write: publish, predict
lazily, write to zarr. Not a benchmark: those compare more, and repeat more.
"""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import dask.array as da
import numpy as np
import torch
import zarr
from click import echo, style
from dask.system import cpu_count

from . import catalog, corpus, loading, publishing, stores, writing
from .arrays import predict
from .cluster import LocalCluster
from .corpus import ANSWERS, QUESTIONS, embed_pool
from .memory import process_memory
from .rows import Array
from .store import ModelRef

NAME = "all-MiniLM-L6-v2"
BLOCK_ROWS = BATCH_SIZE = 32
QUICK_PASSAGES = 200
MOST_WORKERS = 8  # there are 48 blocks
AGAIN = 7


def run_demo(
    *,
    quick: bool = False,
    questions: Sequence[str] = (),
    workers: int | None = None,
    out: str | Path | None = None,
    store: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run the demo and print what it finds.

    Parameters
    ----------
    quick : bool
        A sample of the passages.
    questions : sequence of str
        Asked after the built-in ones.
    workers : int, optional
        Worker processes. Default: one per core, two at least.
    out : path, optional
        Keep the embeddings there, a zarr array ``(passages, 384)``.
    store : str, optional
        As for `zcinfer.connect`.
    quiet : bool
        Print nothing on standard output.

    Returns
    -------
    dict
        The figures, in JSON types; ``passed`` says whether the results are right.
    """
    say: Callable[..., None] = (lambda *_, **__: None) if quiet else echo
    signal.signal(signal.SIGTERM, _terminated)
    directory = corpus.model_directory()
    passages = corpus.passages(QUICK_PASSAGES if quick else None)
    tokens = corpus.tokenise([passage.text for passage in passages])
    order, groups = corpus.length_groups(tokens["attention_mask"], BLOCK_ROWS)
    passages = [passages[row] for row in order]
    tokens = {name: array[order] for name, array in tokens.items()}
    say(
        f"{style('Embed', bold=True)} {len(passages):,} passages of Python's documentation with {NAME}, "
        f"{int(tokens['attention_mask'].sum()):,} tokens"
    )

    workers = workers or min(max(2, cpu_count()), MOST_WORKERS)
    begin = perf_counter()
    with _output(out) as target, _step(say, f"start {workers} workers") as cluster_step:
        with LocalCluster(n_workers=workers) as cluster, cluster.get_client() as client:
            cluster_step()
            if cluster.page_link is not None:
                say(f"  watch it in a browser: {cluster.page_link}")
            with _step(say, "start the store") as step:
                chosen = catalog.connect(store)
                step(chosen.url.partition("?")[0])
            with _step(say, "publish the model") as step:
                ref = publishing.put(_from_pretrained(str(directory)), NAME)
                step(f"{ref}, {ref.nbytes / 1e6:.0f} MB, digest {ref.digest[:12]}")
            ref = catalog.ready(ref)
            with _step(say, "import torch and transformers on each worker") as step:
                prepared = client.run(prepare_worker, ref)
                step()
            with _step(say, "load the model on each, beside from_pretrained") as step:
                # One after the other: on shared cores two loads at once would measure each other.
                measured = [
                    prepared[address] | client.run(measure_worker, ref, str(directory), workers=[address])[address]
                    for address in sorted(prepared)
                ]
                step()

            embeddings = embed(ref, tokens, groups)
            report = writing.write(
                embeddings, target, {"demo": ref.digest}, resume=False, label="embed", progress=not quiet
            )
            rate = report.rows / report.seconds
            for facts, after in zip(measured, _memory_of(client), strict=True):
                facts |= after

        result = np.asarray(zarr.open_array(str(target), mode="r")[:])
        with _step(say, "compare with plain torch in one process") as step:
            checked, equal, difference = compare(result, tokens, groups, directory)
            step(
                f"{checked} of {len(result):,} rows: "
                + ("equal to the last bit" if equal else f"largest difference {difference:.1e}")
            )
        _print_workers(say, measured, ref)
        say(f"\n{style('Throughput', bold=True)}  {rate:,.0f} rows/s on {workers} workers ({report.seconds:.1f} s)")
        answers = [ask(question, result, passages, ref) for question in (*QUESTIONS, *questions)]
        _print_answers(say, answers)

    first = answers[0]["nearest"]
    passed = (equal or difference < 1e-5) and any(near["topic"] in ANSWERS[:2] for near in first)
    seconds = perf_counter() - begin
    say(
        f"\n{style('OK', fg='green', bold=True) if passed else style('FAILED', fg='red', bold=True)}: "
        f"{len(result):,} rows embedded, {checked} compared with plain torch, in {seconds:.0f} s. "
        f"The model stays published: zcinfer ls; zcinfer rm {NAME}"
    )
    return {
        "passed": bool(passed),
        "rows": len(result),
        "rows_per_second": rate,
        "seconds": seconds,
        "compared": {"rows": checked, "equal": equal, "largest_difference": difference},
        "workers": measured,
        "answers": answers,
        "model": str(ref),
        "digest": ref.digest,
        "output": str(target) if out is not None else None,
    }


def embed(ref: ModelRef, tokens: dict[str, Any], groups: Sequence[corpus.LengthGroup]) -> da.Array:
    """Embeddings of all rows, lazy: one prediction a group, each no longer than its rows need."""
    parts = []
    for start, stop, length in groups:
        inputs: dict[str, Any] = {
            name: da.from_array(array[start:stop, :length], chunks=(BLOCK_ROWS, length))
            for name, array in tokens.items()
        }
        parts.append(predict(ref, **inputs, batch_size=BATCH_SIZE, output=embed_pool))
    return da.concatenate(parts)


def compare(
    result: Array, tokens: dict[str, Any], groups: Sequence[corpus.LengthGroup], directory: Path
) -> tuple[int, bool, float]:
    """Compute the first block of each group again with plain torch; rows, whether bit-equal, largest difference."""
    model = _from_pretrained(str(directory))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: the number of threads can change last bits
    checked, equal, difference = 0, True, 0.0
    for start, stop, length in groups:
        rows = slice(start, min(stop, start + BATCH_SIZE))
        inputs = {name: torch.from_numpy(array[rows, :length].copy()) for name, array in tokens.items()}
        with torch.no_grad():
            expected = embed_pool(model(**inputs), inputs).numpy()
        checked += len(expected)
        equal &= np.array_equal(expected, result[rows])
        difference = max(difference, float(np.abs(expected - result[rows]).max()))
    torch.set_num_threads(threads)
    return checked, bool(equal), difference


def ask(question: str, embeddings: Array, passages: Sequence[corpus.Passage], ref: ModelRef) -> dict[str, Any]:
    """The passages nearest to a question."""
    tokens = corpus.tokenise([question])
    length = int(tokens["attention_mask"].sum())
    inputs: dict[str, Any] = {name: array[:, :length] for name, array in tokens.items()}
    embedded = predict(ref, **inputs, output=embed_pool)[0]
    rows, cosines = corpus.nearest(embedded, embeddings)
    return {
        "question": question,
        "nearest": [
            {"topic": passages[row].topic, "text": passages[row].text, "cosine": float(cosine)}
            for row, cosine in zip(rows, cosines, strict=True)
        ],
    }


def prepare_worker(ref: ModelRef) -> dict[str, Any]:
    """Runs in a worker: what a process pays once, whoever loads the model."""
    begin = perf_counter()
    _from_pretrained_class()
    imported = perf_counter()
    stores.open_store(ref.store)
    return {"import_seconds": imported - begin, "connect_seconds": perf_counter() - imported}


def measure_worker(ref: ModelRef, directory: str) -> dict[str, Any]:
    """Runs in a worker: times of loads by us and by from_pretrained, and memory before and after.

    Both sides find the model's code imported and the model's files in the page cache.
    """
    gc.collect()
    before = process_memory()

    def timed(function: Callable[[], Any]) -> float:
        begin = perf_counter()
        function()
        return (perf_counter() - begin) * 1e3

    begin = perf_counter()
    model = loading.load_ref(ref)
    first = (perf_counter() - begin) * 1e3
    phases = {name: value * 1e3 for name, value in loading.loads[-1].seconds.items()}
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().sum()  # a page counts once it is touched
    after = process_memory()
    del model
    with loading.residents.lend(ref, "cpu", "refuse"):
        pass
    back = []
    for _ in range(100):
        begin = perf_counter()
        with loading.residents.lend(ref, "cpu", "refuse"):
            back.append((perf_counter() - begin) * 1e6)
    first_theirs = timed(lambda: _from_pretrained(directory))
    ours, theirs = [], []
    for _ in range(AGAIN):
        ours.append(timed(lambda: loading.load_ref(ref)))
        theirs.append(timed(lambda: _from_pretrained(directory)))
    return {
        "pid": os.getpid(),
        "store": loading.loads[-1].store,
        "protection": loading.loads[-1].protection,
        "first_load_ms": first,
        "first_load_phases_ms": phases,
        "load_again_ms": median(ours),
        "back_to_resident_us": median(back),
        "from_pretrained_first_ms": first_theirs,
        "from_pretrained_ms": median(theirs),
        "model_private_bytes": after.private - before.private,
        "model_shared_bytes": after.shared - before.shared,
    }


def _memory_of(client: Any) -> list[dict[str, int]]:
    def both() -> dict[str, int]:
        found = process_memory()
        return {"private_bytes": found.private, "shared_bytes": found.shared}

    found = client.run(both)
    return [found[address] for address in sorted(found)]


def _from_pretrained_class() -> Any:
    # Transformers looks for newer files on its hub; everything here is on disk.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return BertModel


def _from_pretrained(directory: str) -> Any:
    return _from_pretrained_class().from_pretrained(directory).eval()


def _print_workers(say: Callable[..., None], measured: Sequence[dict[str, Any]], ref: ModelRef) -> None:
    def row(label: str, values: Sequence[str]) -> None:
        say(f"  {label:<44}" + "".join(f"{value:>14}" for value in values))

    first = [facts["from_pretrained_first_ms"] / facts["first_load_ms"] for facts in measured]
    again = [facts["from_pretrained_ms"] / facts["load_again_ms"] for facts in measured]
    how = f"{measured[0]['store']} store, {measured[0]['protection']}"
    say(f"\n{style('Loading', bold=True)}  {ref.nbytes / 1e6:.0f} MB of weights ({how})")
    row("", [f"worker {number}" for number in range(len(measured))])
    row("zcinfer, first load", [f"{facts['first_load_ms']:.1f} ms" for facts in measured])
    row("from_pretrained, first load", [f"{facts['from_pretrained_first_ms']:.1f} ms" for facts in measured])
    row("  times faster", [f"{ratio:.0f} x" for ratio in first])
    row(f"zcinfer, again (median of {AGAIN})", [f"{facts['load_again_ms']:.1f} ms" for facts in measured])
    row(f"from_pretrained, again (median of {AGAIN})", [f"{facts['from_pretrained_ms']:.1f} ms" for facts in measured])
    row("  times faster", [f"{ratio:.0f} x" for ratio in again])
    row("back to a loaded model", [f"{facts['back_to_resident_us']:.0f} µs" for facts in measured])
    row("once a process: imports", [f"{facts['import_seconds']:.1f} s" for facts in measured])
    row("once a process: connecting to the store", [f"{facts['connect_seconds']:.2f} s" for facts in measured])
    say(f"\n{style('Memory', bold=True)}  of each worker")
    row("private, for the model", [f"{facts['model_private_bytes'] / 1e6:.1f} MB" for facts in measured])
    row("shared, for the model", [f"{facts['model_shared_bytes'] / 1e6:.1f} MB" for facts in measured])
    row("private, in all, after the job", [f"{facts['private_bytes'] / 1e6:.0f} MB" for facts in measured])
    row("shared, in all, after the job", [f"{facts['shared_bytes'] / 1e6:.0f} MB" for facts in measured])


def _print_answers(say: Callable[..., None], answers: Sequence[dict[str, Any]]) -> None:
    for answer in answers:
        say(f"\n{style(answer['question'], bold=True)}")
        for near in answer["nearest"]:
            text = near["text"] if len(near["text"]) <= 110 else near["text"][:107] + "..."
            say(f"  {near['cosine']:.2f}  {near['topic']:<18} {text}")


@contextmanager
def _step(say: Callable[..., None], what: str) -> Iterator[Callable[..., None]]:
    """Say what is going on before it is, and how long it took once the yielded function is called."""
    begin = perf_counter()
    say(f"  {what} ...", nl=False)

    def done(found: str = "") -> None:
        say(f" {perf_counter() - begin:.1f} s" + (f" ({found})" if found else ""))

    yield done


@contextmanager
def _output(out: str | Path | None) -> Iterator[Path]:
    """Where the embeddings go: to ``out``, or to a directory that goes with this process."""
    if out is not None:
        writing.check_target(out)
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="zcinfer-demo-") as directory:
        yield Path(directory) / "embeddings.zarr"


def _terminated(*_: Any) -> None:
    # Like Ctrl-C: workers, Ray and temporary files go before this process does.
    raise SystemExit(143)
