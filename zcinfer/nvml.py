"""What NVIDIA's driver says of the cards that this process may use: by NVML, through the package ``nvidia-ml-py``.

Each figure is a number, or says why there is none. Not for choosing cards, nor for when they are asked (`sampling`):
a question may take milliseconds, and has no place on an event loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable
from typing import Any

from .condition import UNAVAILABLE
from .device import BY_PLACE, ORDER, shown

# A figure, or "unavailable: <reason>"
Figure = float | str

# Of a card, and what each is. "own": of this process.
FIGURES = {
    "utilization": "percent of the time that a kernel ran, in the driver's last period",
    "memory_busy": "percent of the time that its memory was read or written",
    "memory_used": "bytes",
    "memory_total": "bytes",
    "temperature": "degrees Celsius",
    "power": "watts",
    "power_limit": "watts",
    "clock": "MHz, of the multiprocessors",
    "clock_memory": "MHz, of the memory",
    "own_memory": "bytes",
    "own_utilization": "percent",
}

# Why clocks are lower than they could be; the rest are no limits, as idle, or settings.
_THROTTLES = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "temperature",
    0x40: "temperature (hardware)",
    0x80: "power brake",
    0x200: "board limit",
    0x400: "reliability",
}

_NO_PACKAGE = "the package nvidia-ml-py is not installed (pip install 'zcinfer[gpu]')"


def present() -> bool:
    """Whether this process may have cards: there is a driver, and ``CUDA_VISIBLE_DEVICES`` does not hide them all."""
    if shown(os.environ) == []:
        return False
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


class Driver:
    """NVIDIA's driver, asked for the cards of this process.

    Raises
    ------
    OSError
        It cannot be asked: the reason.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise OSError(_NO_PACKAGE) from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise OSError(_reason(error)) from None
        # Time of the newest sample of each card's processes, microseconds
        self._sampled: dict[str, int] = {}

    def cards(self) -> list[dict[str, Any]]:
        """The cards that this process may use, each with its figures.

        Returns
        -------
        list of dict
            "card" (what it was asked for as), "name", "uuid"; those of `FIGURES`, each a number or "unavailable:
            <reason>"; and "throttled": why its clocks are lowered, "" where they are not.

        Raises
        ------
        OSError
            The driver does not answer.
        """
        try:
            wanted = shown(os.environ)
            if wanted is None:
                wanted = [str(number) for number in range(self._nvml.nvmlDeviceGetCount())]
            return [self._card(name) for name in wanted]
        except self._nvml.NVMLError as error:
            raise OSError(_reason(error)) from None

    def _card(self, asked: str) -> dict[str, Any]:
        nvml = self._nvml
        try:
            handle = self._handle(asked)
        except nvml.NVMLError_Uninitialized:
            raise
        except (nvml.NVMLError, LookupError) as error:
            problem = f"{UNAVAILABLE}{_reason(error)}"
            return {"card": asked, "name": problem, "uuid": problem, **dict.fromkeys((*FIGURES, "throttled"), problem)}
        # Of an instance of a card that is divided (MIG) only the memory is its own.
        whole, divided = handle, False
        with contextlib.suppress(nvml.NVMLError):
            if asked.startswith("MIG-"):
                whole = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            divided = bool(nvml.nvmlDeviceGetMigMode(whole)[0])
        ask = _Questions(nvml, divided)
        memory = ask.group(lambda: nvml.nvmlDeviceGetMemoryInfo(handle), ("used", "total"))
        busy = ask.group(lambda: nvml.nvmlDeviceGetUtilizationRates(handle), ("gpu", "memory"))
        mine = ask.any(lambda: self._process(handle))
        return {
            "card": asked,
            "name": ask.any(lambda: nvml.nvmlDeviceGetName(handle)),
            "uuid": ask.any(lambda: nvml.nvmlDeviceGetUUID(handle)),
            "utilization": busy["gpu"],
            "memory_busy": busy["memory"],
            "memory_used": memory["used"],
            "memory_total": memory["total"],
            "temperature": ask.number(lambda: self._temperature(whole)),
            "power": ask.number(lambda: nvml.nvmlDeviceGetPowerUsage(whole) / 1e3),
            "power_limit": ask.number(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(whole) / 1e3),
            "clock": ask.number(lambda: nvml.nvmlDeviceGetClockInfo(whole, nvml.NVML_CLOCK_SM)),
            "clock_memory": ask.number(lambda: nvml.nvmlDeviceGetClockInfo(whole, nvml.NVML_CLOCK_MEM)),
            "throttled": ask.any(lambda: _throttles(self._clock_reasons(whole))),
            "own_memory": mine if isinstance(mine, str) else _own_memory(mine),
            "own_utilization": mine if isinstance(mine, str) else ask.number(lambda: self._own_share(handle)),
        }

    def _handle(self, asked: str) -> Any:
        nvml = self._nvml
        if not asked.isdecimal():
            return nvml.nvmlDeviceGetHandleByUUID(asked)
        if os.environ.get(ORDER) != BY_PLACE and shown(os.environ) is not None:
            handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
            if len({nvml.nvmlDeviceGetName(handle) for handle in handles}) > 1:
                raise LookupError(
                    f"cards differ, and CUDA numbers them in another order than the driver: set {ORDER}={BY_PLACE}"
                )
        return nvml.nvmlDeviceGetHandleByIndex(int(asked))

    def _temperature(self, handle: Any) -> Any:
        nvml = self._nvml
        try:
            return nvml.nvmlDeviceGetTemperatureV(handle, nvml.NVML_TEMPERATURE_GPU)
        except (AttributeError, nvml.NVMLError_FunctionNotFound):  # an older package, or driver
            return nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)

    def _clock_reasons(self, handle: Any) -> int:
        nvml = self._nvml
        try:
            return int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        except (AttributeError, nvml.NVMLError_FunctionNotFound):
            return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))

    def _process(self, handle: Any) -> Any:
        """What the driver lists of this process, or why it does not."""
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid():
                return process
        # A container has process ids of its own, and the driver has the machine's.
        return f"{UNAVAILABLE}the driver lists no process {os.getpid()}: it has not used the card, or is in a container"

    def _own_share(self, handle: Any) -> float:
        nvml = self._nvml
        uuid = str(nvml.nvmlDeviceGetUUID(handle))
        since = self._sampled.get(uuid, int((time.time() - 5) * 1e6))
        try:
            samples = nvml.nvmlDeviceGetProcessUtilization(handle, since)
        except nvml.NVMLError_NotFound:
            return 0.0  # nothing ran since
        self._sampled[uuid] = max((sample.timeStamp for sample in samples), default=since)
        mine = [sample.smUtil for sample in samples if sample.pid == os.getpid()]
        return sum(mine) / len(mine) if mine else 0.0


class _Questions:
    """Asks for figures; where there is none, the answer says why."""

    def __init__(self, nvml: Any, divided: bool):
        self._nvml, self._divided = nvml, divided

    def any(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self._nvml.NVMLError_NotSupported as error:
            why = "not told while the card is divided (MIG)" if self._divided else _reason(error)
            return f"{UNAVAILABLE}{why}"
        except self._nvml.NVMLError as error:
            return f"{UNAVAILABLE}{_reason(error)}"

    def number(self, question: Callable[[], Any]) -> Figure:
        found = self.any(question)
        return found if isinstance(found, str) else float(found)

    def group(self, question: Callable[[], Any], names: tuple[str, ...]) -> dict[str, Figure]:
        """Figures that are told together."""
        found = self.any(question)
        return {name: found if isinstance(found, str) else float(getattr(found, name)) for name in names}


def _own_memory(process: Any) -> Figure:
    memory = process.usedGpuMemory
    return f"{UNAVAILABLE}not told by the driver" if memory is None else float(memory)


def _throttles(mask: int) -> str:
    return ", ".join(why for bit, why in _THROTTLES.items() if mask & bit)


def _reason(error: BaseException) -> str:
    """What went wrong, in words."""
    reasons = {
        "NVMLError_NotSupported": "this card does not tell it",
        "NVMLError_NoPermission": "this user may not read it",
        "NVMLError_FunctionNotFound": "the driver is too old for it",
    }
    return reasons.get(type(error).__name__, str(error) or type(error).__name__)


_driver: Driver | None = None


def read() -> list[dict[str, Any]] | str:
    """What `Driver.cards` gives, from the one driver of this process; "unavailable: <reason>" where there is nothing.

    Notes
    -----
    For one thread: it opens the driver at the first call, and again after it has failed.
    """
    global _driver
    try:
        _driver = _driver or Driver()
        return _driver.cards()
    except OSError as error:
        _driver = None
        return f"{UNAVAILABLE}{error}"
