"""Which GPUs this machine has, and which of them CUDA shows to a process.

By NVML alone, which starts no CUDA: a process that only hands out GPUs must not hold memory of one. Not for handing
them out (`pinning`), nor for figures of their load.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .errors import SettingsError

# Read by CUDA when a process first asks for it, and never again
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
# Without it CUDA counts the fastest card first, and nvidia-smi and NVML by their places on the bus
BY_PLACE = "PCI_BUS_ID"


def shown(environment: Mapping[str, str]) -> list[str] | None:
    """Names in CUDA_VISIBLE_DEVICES, numbers or ids, as CUDA reads it; None: it is not set, and all cards are shown.

    Examples
    --------
    >>> shown({"CUDA_VISIBLE_DEVICES": "1, GPU-8f, -1, 0"})
    ['1', 'GPU-8f']
    """
    if VISIBLE not in environment:
        return None
    found = []
    for part in environment[VISIBLE].split(","):
        name = part.strip()
        if not (name.isdecimal() or name.startswith(("GPU-", "MIG-"))):
            break  # what comes after one that is none is hidden, too
        found.append(name)
    return found


@dataclass(frozen=True)
class Device:
    """A GPU, or an instance of one in MIG mode: what one process can be given.

    Attributes
    ----------
    card : int
        Number of the card, as nvidia-smi counts.
    uuid : str
        "GPU-..." or "MIG-...".
    name : str
        Of the product.
    instance : int, optional
        Number of the instance on its card.
    cpus : frozenset of int
        CPUs of the card's NUMA node; empty where they are not known.
    unbound : str
        Why they are not.
    """

    card: int
    uuid: str
    name: str = ""
    instance: int | None = None
    cpus: frozenset[int] = frozenset()
    unbound: str = ""

    @property
    def label(self) -> str:
        """Short name, unique on this machine: "gpu0", "gpu1-mig2"."""
        return f"gpu{self.card}" if self.instance is None else f"gpu{self.card}-mig{self.instance}"

    def __str__(self) -> str:
        return f"{self.card} ({self.name}, {self.uuid})" if self.instance is None else f"{self.uuid} ({self.name})"


@dataclass(frozen=True)
class Inventory:
    """What NVML says of this machine.

    Attributes
    ----------
    devices : tuple of Device
        What processes can be given. Of a card in MIG mode its instances, and not the card.
    split : dict of int to str
        Cards in MIG mode: number and UUID.
    lost : dict of int to str
        Cards that do not answer: number and reason.
    """

    devices: tuple[Device, ...] = ()
    split: Mapping[int, str] = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)

    def named(self, text: str) -> list[Device]:
        """Devices of that number, or whose UUID begins so; of a card in MIG mode, its instances."""
        if text.isdecimal():
            return [device for device in self.devices if device.card == int(text)]
        if not text.startswith(("GPU-", "MIG-")):
            return []
        cards = [card for card, uuid in self.split.items() if uuid.startswith(text)]
        return [device for device in self.devices if device.uuid.startswith(text) or device.card in cards]

    def visible(self, environment: Mapping[str, str]) -> tuple[Device, ...]:
        """Devices that CUDA shows to a process with this environment.

        Raises
        ------
        SettingsError
            It counts cards in an order that cannot be told.
        """
        names = shown(environment)
        if names is None:
            return self.devices
        found: list[Device] = []
        for name in names:
            named = self.named(name)
            if not named:
                break  # as CUDA does: what comes after the first that is none does not count
            if name.isdecimal():
                self._check_order(environment)
            found += named
        return tuple(found)

    def _check_order(self, environment: Mapping[str, str]) -> None:
        products = sorted({device.name for device in self.devices if device.instance is None})
        if len(products) > 1 and environment.get(ORDER) != BY_PLACE:
            raise SettingsError(
                f"{VISIBLE}={environment[VISIBLE]!r} counts the fastest card first, unless {ORDER}={BY_PLACE}, and the "
                f"cards here differ ({', '.join(products)}): which ones it means cannot be told. Set "
                f"{ORDER}={BY_PLACE}, or name cards by UUID"
            )


def inventory() -> Inventory:
    """Ask NVML.

    Raises
    ------
    SettingsError
        There is no NVML to ask, or no driver.
    """
    with _nvml() as nvml:
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            raise no_gpu(f"the driver does not answer ({error})") from error
        devices: list[Device] = []
        split, lost = {}, {}
        for card in range(count):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(card)
                uuid, cpus = nvml.nvmlDeviceGetUUID(handle), _cpus_near(nvml, handle)
                if not _is_split(nvml, handle):
                    devices.append(Device(card, uuid, nvml.nvmlDeviceGetName(handle), None, *cpus))
                    continue
                split[card] = uuid
                for number, instance in _instances(nvml, handle):
                    name = nvml.nvmlDeviceGetName(instance)
                    devices.append(Device(card, nvml.nvmlDeviceGetUUID(instance), name, number, *cpus))
            except nvml.NVMLError as error:
                lost[card] = str(error)
        return Inventory(tuple(devices), split, lost)


def gone(environment: Mapping[str, str]) -> str:
    """Why the GPU that a process with this environment was given is not there any more; "" if it is, or who knows."""
    name = environment.get(VISIBLE, "").partition(",")[0].strip()
    if not name.startswith(("GPU-", "MIG-")):
        return ""
    try:
        found = inventory()
    except SettingsError:
        return ""
    if found.named(name):
        return ""
    told = "".join(f"; of GPU {card} it says: {reason}" for card, reason in found.lost.items())
    return f"NVML shows no {name} any more{told}"


def no_gpu(found: str) -> SettingsError:
    """The error that says that there is no GPU, and what to do."""
    return SettingsError(
        f"no NVIDIA GPU was found: {found}. Leave out gpus= (--gpus) to compute on the CPU. Where there is a GPU: "
        "`nvidia-smi` must show it; a container needs --gpus all and NVIDIA's container toolkit"
    )


@contextmanager
def _nvml() -> Iterator[Any]:
    try:
        import pynvml
    except ImportError as error:
        raise SettingsError(
            "to find GPUs takes the package nvidia-ml-py, which is not installed: pip install 'zcinfer[gpu]'. Leave "
            "out gpus= (--gpus) to compute on the CPU"
        ) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise no_gpu(f"NVML cannot be used ({error})") from error
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _is_split(nvml: Any, handle: Any) -> bool:
    try:
        mode, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError as error:
        if error.value in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            return False
        raise
    return bool(mode)


def _instances(nvml: Any, handle: Any) -> Iterator[tuple[int, Any]]:
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield number, nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError as error:
            if error.value != nvml.NVML_ERROR_NOT_FOUND:
                raise


def _cpus_near(nvml: Any, handle: Any) -> tuple[frozenset[int], str]:
    words = -(-os.sysconf("SC_NPROCESSORS_CONF") // 64)
    try:
        masks = nvml.nvmlDeviceGetCpuAffinity(handle, words)
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_GPU_IS_LOST:
            raise
        return frozenset(), f"NVML does not say which are near ({error})"
    cpus = {64 * word + bit for word, mask in enumerate(masks) for bit in range(64) if mask >> bit & 1}
    return frozenset(cpus), "" if cpus else "NVML does not say which are near"
