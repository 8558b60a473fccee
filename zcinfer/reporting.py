"""``zc.report``: what ran inside a ``with`` block, as a page in one file and as samples for programs.

Asks the scheduler of the current client, or this process where there is none, once a second, so that something is known
of a scheduler that dies. Not for whom it asks (`asking`), what is on the page (`zcinfer.dashboard`), nor for a job's
result (`jobreport`).
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import catalog
from .activation import check_installed
from .asking import Cluster, Here, Source
from .errors import OutputError, SettingsError

log = logging.getLogger("zcinfer")

# Seconds between two questions, and that what was given up may take to end
_EVERY, _SETTLING = 1.0, 3.0


@contextmanager
def report(path: str | Path) -> Iterator[Path]:
    """Write a report of what runs inside the block: a page in one file, and samples for programs.

    Parameters
    ----------
    path : path
        An ``.html`` file: the dashboard's page, as it is when the block ends, of this block's jobs alone. It needs no
        network, now or years later. Beside it ``.jsonl``: first the state, then what was counted in each second.

    Yields
    ------
    pathlib.Path
        Where the page will be.

    Raises
    ------
    SettingsError
        The packages of the extra ``dashboard`` are not installed; nothing is counted (setting ``zcinfer.telemetry``);
        the cluster cannot be watched; or, by the first use of a model, a cluster that was made inside the block.
    OutputError
        A file cannot be written there.

    Notes
    -----
    It tells of the jobs that the current Dask client submits inside the block; where there is none, of what this
    process computes: NumPy arrays, and Dask's own schedulers. Of the devices it tells all that they did meanwhile.

    An exception inside the block goes on, and the report says so. So it does where the scheduler was lost: then it
    tells what was last known of it, a second before or less. Series are those of the last hour.

    Examples
    --------
    >>> import pathlib, tempfile, numpy as np, torch, zcinfer as zc
    >>> _ = zc.connect("file"), zc.put(torch.nn.Linear(4, 2).eval(), "doc-report")
    >>> with report(pathlib.Path(tempfile.mkdtemp()) / "run.html") as page:
    ...     y = zc.predict("doc-report", np.ones((100, 4), "f4"))
    >>> page.exists(), page.with_suffix(".jsonl").exists()
    (True, True)
    """
    page = check_path(path)
    client = catalog.dask_client()
    with _watched(Here() if client is None else Cluster(client)) as watch:
        try:
            with _same_client(client):
                yield page
        except BaseException as error:
            watch.end(None if isinstance(error, SystemExit) and not error.code else error)
            try:
                _write(page, watch)
            except OutputError as failed:  # as an error it would hide the other
                log.warning("%s", failed)
            raise
        watch.end(None)
        _write(page, watch)


def check_path(path: str | Path) -> Path:
    """The path of a report, as it will be; refused where it cannot be written.

    Raises
    ------
    SettingsError, OutputError
    """
    check_installed()
    page = Path(path).expanduser().absolute()
    if page.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"a report is an HTML file, and {page.name} is not called one: {page.name}.html")
    for file in (page, page.with_suffix(".jsonl")):
        if file.is_dir():
            raise OutputError(f"the report cannot be written: {file} is a directory. Give the path of a file")
    try:
        tempfile.TemporaryFile(dir=page.parent).close()
    except OSError as error:
        raise OutputError(
            f"the report cannot be written to {page.parent}: {error.strerror}. Make the directory, or name another"
        ) from error
    return page


# Watching


class _Watch:
    """Asks once a second, from its own thread."""

    def __init__(self, source: Source):
        self.source = source
        self.begun = time.time()
        self.recording = source.begin()
        self.error: BaseException | None = None
        self.lost: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zcinfer-report", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(_EVERY):
            with suppress(Exception):  # whatever it is, the end will tell
                self.recording.take(self.source.ask(self.recording.since))

    def stop(self) -> None:
        """Ask no more."""
        self._end.set()
        self._thread.join()

    def end(self, error: BaseException | None) -> None:
        """Ask for the last time."""
        self.stop()
        self.error = error
        deadline = time.monotonic() + (_SETTLING if error is not None else 0.0)
        try:
            while True:
                self.recording.take(self.source.last(self.recording.since))
                # What an exception leaves behind is given up, which the scheduler has to be told first
                if time.monotonic() >= deadline or all(job["ended"] for job in self.recording.jobs):
                    break
                time.sleep(0.05)
        except Exception as problem:
            self.lost = str(problem) or type(problem).__name__

    def notes(self) -> Iterator[str]:
        """What a reader of the report must know, in sentences."""
        if self.error is not None:
            yield f"The program was stopped by {_said(self.error)}"
        if self.lost is not None:
            ago = max(0.0, time.time() - self.recording.last["now"])
            yield f"The scheduler did not answer at the end ({self.lost}): this was known of it {ago:.1f} s before."
        if not self.recording.jobs:
            yield "Nothing was predicted."
        yield from self.source.notes(self.recording)


@contextmanager
def _watched(source: Source) -> Iterator[_Watch]:
    watch = _Watch(source)
    try:
        yield watch
    finally:
        watch.stop()
        source.close()


@contextmanager
def _same_client(client: Any) -> Iterator[None]:
    """Have the use of a model refused where another client than that one has become current."""

    def check() -> None:
        found = catalog.dask_client()
        if found is not None and found is not client:
            raise SettingsError(
                f"zc.report was entered before the Dask client of {found.scheduler.address} was current, and knows "
                "nothing of what is computed there: enter zc.report inside the block of the cluster and its client."
            )

    catalog.guards.append(check)
    try:
        yield
    finally:
        catalog.guards.remove(check)


def _said(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# Writing


def _write(page: Path, watch: _Watch) -> None:
    from .dashboard import page as pages
    from .dashboard.history import History
    from .dashboard.samples import lines

    snapshot, notes = watch.recording.snapshot(), list(watch.notes())
    history = History.of([snapshot], watch.source.address)
    if watch.lost is not None:
        history.runs = [replace(run, state="lost", ended=history.now) if run.active else run for run in history.runs]
    about = {
        "begun": watch.begun,
        "ended": time.time(),
        "error": _said(watch.error) if watch.error is not None else None,
        "notes": notes,
    }
    try:
        _replace(page.with_suffix(".jsonl"), lines(snapshot | {"report": about}))
        _replace(page, [pages.report(history, notes)])
    except OSError as error:
        raise OutputError(f"the report {page} could not be written: {error.strerror}") from error


def _replace(path: Path, texts: Iterator[str] | Sequence[str]) -> None:
    """Write a file that is there, with the rights that others have, when it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(texts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
