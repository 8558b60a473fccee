"""One measured run: a fresh process and all that it starts, watched from outside, and ended where it hangs.

    python -m zcinfer.benchmarks.runs MODULE:FUNCTION ARGUMENTS RESULT

is what such a process is. Memory is read from /proc a few times a second, so that short peaks are missed; the times of
what is done inside are for the process itself to tell.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

from zcinfer.memory import process_memory

Number = TypeVar("Number", int, float)

MARK = "ZCINFER_BENCHMARK"
# Not resolved: benchmarks is a link in a checkout.
ROOT = Path(__file__).absolute().parents[2]
# Seconds between looks at the memory, and at the proportional share of it, which costs the process some milliseconds.
INTERVAL, PSS_INTERVAL = 0.2, 3.0
# Seconds that a run's processes have for their end, once their first has ended or was asked to.
PATIENCE = 10.0


@dataclass
class Outcome:
    """What a run gave.

    Attributes
    ----------
    begun : float
        ``time.monotonic()`` when its first process was started.
    seconds : float
        Until that ended.
    result : Any
        What its function returned, in JSON types.
    error : str
        Why there is no result; "" where there is one.
    private : list of dict
        Bytes that each process had to itself (``RssAnon``), by pid, look by look.
    pss : int
        The most bytes of all processes, those shared counted by share (``Pss``), files mapped into memory among them.
    cpu : dict
        Seconds of processors that each process had used when it was last seen, by pid.
    left : list of str
        Processes that were still there `PATIENCE` seconds after the first, and were ended.
    """

    begun: float
    seconds: float = 0.0
    result: Any = None
    error: str = ""
    private: list[dict[int, int]] = field(default_factory=list)
    pss: int = 0
    cpu: dict[int, float] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def peak(self, pids: Collection[int] | None = None) -> int:
        """The most private bytes that all processes, or these, had together."""
        sums = (sum(n for pid, n in look.items() if pids is None or pid in pids) for look in self.private)
        return max(sums, default=0)


class Family:
    """The processes of a run: the first, the children of any, and whoever else has its mark in the environment.

    (Ray's processes write their titles over their environment, and some processes are adopted by others.)
    """

    def __init__(self, first: int, mark: str):
        self.first, self._mark = first, f"{MARK}={mark}".encode()
        self._known, self._others = {first}, set(_pids())

    def look(self) -> set[int]:
        """Pids of those that are there."""
        there = set(_pids())
        self._known &= there | {self.first}
        self._others &= there
        for pid in sorted(there - self._known - self._others):
            with suppress(OSError):
                mine = _parent(pid) in self._known or self._mark in Path(f"/proc/{pid}/environ").read_bytes()
                (self._known if mine else self._others).add(pid)
        return self._known & there

    def end(self) -> list[str]:
        """Give them time to end, then end them; what was left."""
        deadline = monotonic() + PATIENCE
        while (there := self._living()) and monotonic() < deadline:
            sleep(0.05)
        for pid in there:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [_title(pid) for pid in there]

    def _living(self) -> list[int]:
        return [pid for pid in self.look() if pid != self.first and _state(pid) != "Z"]


def run(function: str, arguments: Mapping[str, Any], timeout: float, env: Mapping[str, str] | None = None) -> Outcome:
    """Call a function in a fresh process.

    Parameters
    ----------
    function : str
        "module:name"; gets the arguments by keyword, and returns JSON types.
    arguments : dict
        In JSON types.
    timeout : float
        Seconds after which it is ended: a run that hangs is told, and not waited for.
    env : dict, optional
        Environment variables for it, in addition to ours.

    Returns
    -------
    Outcome
    """
    mark = uuid.uuid4().hex
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **(env or {}), MARK: mark, "PYTHONPATH": path}
    with tempfile.TemporaryDirectory(prefix="zcinfer-run-") as directory:
        answer = Path(directory, "answer.json")
        command = [sys.executable, "-m", "zcinfer.benchmarks.runs", function, json.dumps(dict(arguments)), str(answer)]
        with open(Path(directory, "stderr"), "w+") as said:
            # A session of its own: Ctrl-C is for this process, which then ends the others.
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
            outcome, family = Outcome(monotonic()), Family(process.pid, mark)
            try:
                _watch(process, family, outcome, timeout)
            finally:
                if process.poll() is None:
                    _interrupt(process)
                outcome.seconds = outcome.seconds or monotonic() - outcome.begun
                outcome.left = family.end()
            said.seek(0)
            last = "".join(said.readlines()[-12:])
        if not outcome.error and process.returncode == 0:
            outcome.result = json.loads(answer.read_text())
        elif not outcome.error:
            outcome.error = f"ended with status {process.returncode}: {last}"
        else:
            outcome.error += f"; it last said: {last}"
    return outcome


def _watch(process: subprocess.Popen[bytes], family: Family, outcome: Outcome, timeout: float) -> None:
    next_pss = outcome.begun + PSS_INTERVAL
    while True:
        try:
            process.wait(INTERVAL)
            outcome.seconds = monotonic() - outcome.begun
            return
        except subprocess.TimeoutExpired:
            pass
        pids = family.look()
        outcome.private.append({pid: n for pid in pids if (n := _number(lambda p: process_memory(p).private, pid))})
        outcome.cpu |= {pid: seconds for pid in pids if (seconds := _number(_cpu, pid))}
        if monotonic() > next_pss:
            outcome.pss = max(outcome.pss, sum(_number(_pss, pid) for pid in pids))
            next_pss = monotonic() + PSS_INTERVAL
        if monotonic() - outcome.begun > timeout:
            outcome.error = f"not done after {timeout:.0f} s"
            return


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _number(read: Callable[[int], Number], pid: int) -> Number | int:
    try:
        return read(pid)
    except OSError:  # it has just ended
        return 0


def _pss(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _cpu(pid: int) -> float:
    return sum(map(int, _stat(pid)[11:13])) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _parent(pid: int) -> int:
    return int(_stat(pid)[1])


def _state(pid: int) -> str:
    try:
        return _stat(pid)[0]
    except OSError:
        return "Z"


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:100].strip()
    except OSError:
        return str(pid)


def main() -> None:
    function, arguments, answer = sys.argv[1:]
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(answer).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
