"""Calls that may never return, as those of a Ray whose raylet is gone or of a server that is silent: given up in time.

Not for what a call that was given up does later: nothing ends it, and its thread is left behind.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

Outcome = tuple[Any, BaseException | None]


class _Caller:
    """A thread that makes calls for others, who need not wait for ever."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Outcome]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="zcinfer-call").start()

    def ask(self, function: Callable[[], Any], seconds: float) -> Outcome | None:
        """Result or exception of a call; None when it has not returned in time, and this thread is no more of use."""
        answer: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._calls.put((function, answer))
        try:
            return answer.get(timeout=max(0.0, seconds))
        except BaseException as error:
            self._calls.put((sys.exit, answer))  # should it ever come back
            if isinstance(error, queue.Empty):
                return None
            raise

    def _serve(self) -> None:
        while True:
            function, answer = self._calls.get()
            if function is sys.exit:
                return
            try:
                outcome: Outcome = function(), None
            except BaseException as error:  # a released ray.get raises SystemExit, which must not end the caller
                outcome = None, error
            answer.put(outcome)
            # What it returned or raised is not to live until the next call.
            del function, answer, outcome


# Threads that wait for calls: a new one takes as long as a call.
_callers: deque[_Caller] = deque()
os.register_at_fork(after_in_child=_callers.clear)


def join_within(seconds: float, function: Callable[[], Any]) -> Outcome | None:
    """Result or exception of a call, or None when it has not returned in time; its thread is then left behind.

    Examples
    --------
    >>> join_within(60, lambda: 2 + 3)
    (5, None)
    """
    try:
        caller = _callers.pop()
    except IndexError:
        caller = _Caller()
    outcome = caller.ask(function, seconds)
    if outcome is not None:
        _callers.append(caller)
    return outcome
