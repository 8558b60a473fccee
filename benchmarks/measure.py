"""The clock: functions timed in turn, in forked children where they must start from nothing, and their spread."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each function a round: what slows the machine slows all of them.

    In another order each round, since each finds the caches as the one before has left them. What a call returns is
    dropped outside the clock.
    """
    shuffled, order = random.Random(0), list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            function = functions[name]
            begin = perf_counter()
            result = function()
            seconds[name].append(perf_counter() - begin)
            del result
    return seconds


def forked(function: Callable[[], Any]) -> Any:
    """What ``function`` returns, in JSON types, from a forked child: imports done, and nothing else.

    The caller must have started no threads: neither Ray's nor OpenMP's.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            os.close(reader)
            gc.collect()
            text = json.dumps(function())
            with os.fdopen(writer, "w") as file:
                file.write(text)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise SystemExit(f"a measuring process failed with status {os.waitstatus_to_exitcode(status)}")
    return json.loads(text)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, number, and the spread: how far apart the quartiles lie, as a part of the median.

    Examples
    --------
    >>> summary([1, 2, 3, 4, 5])
    {'median': 3.0, 'low': 2.0, 'high': 4.0, 'n': 5, 'spread': 0.6666666666666666}
    """
    low, median, high = (float(value) for value in np.quantile(seconds, (0.25, 0.5, 0.75)))
    spread = (high - low) / median if median else 0.0
    return {"median": median, "low": low, "high": high, "n": len(seconds), "spread": spread}
