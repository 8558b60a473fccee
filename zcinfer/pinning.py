"""Which worker gets which GPU: what was asked for against what there is, a place for each worker, and its CPUs.

Not for what GPUs there are (`device`), nor for starting workers (`nanny`, `cluster`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from .device import BY_PLACE, ORDER, VISIBLE, Device, Inventory, inventory, no_gpu
from .errors import SettingsError


def choose(gpus: Any, found: Inventory, environment: Mapping[str, str]) -> tuple[Device, ...]:
    """The devices that were asked for.

    Parameters
    ----------
    gpus : "all", int, str, or a sequence of int and str
        Numbers as nvidia-smi counts, UUIDs ("GPU-...", "MIG-..." or the beginning of one), or text with commas between.
    found : Inventory
    environment : mapping
        Of the process that asks, whose CUDA_VISIBLE_DEVICES may hide some.

    Raises
    ------
    SettingsError
        One is not there, is hidden, was given twice, or is a card in MIG mode.

    Examples
    --------
    >>> from zcinfer.device import Device, Inventory
    >>> two = Inventory((Device(0, "GPU-a0"), Device(1, "GPU-b1")))
    >>> [device.label for device in choose("all", two, {})]
    ['gpu0', 'gpu1']
    >>> [device.label for device in choose(["GPU-b", 0], two, {})]
    ['gpu1', 'gpu0']
    >>> choose(1, two, {"CUDA_VISIBLE_DEVICES": "0"})
    Traceback (most recent call last):
    ...
    zcinfer.errors.SettingsError: gpus=1: GPU 1 is hidden from this program by CUDA_VISIBLE_DEVICES='0'. ...
    """
    wanted = _listed(gpus)
    visible = found.visible(environment)
    if wanted == ["all"]:
        if visible:
            return visible
        if found.devices:
            raise SettingsError(
                f"gpus={gpus!r}: {VISIBLE}={environment[VISIBLE]!r} hides all GPUs of this machine "
                f"({_names(found.devices)}) from this program. Unset it, or leave out gpus="
            )
        raise no_gpu("; ".join(f"GPU {card}: {why}" for card, why in found.lost.items()) or "the driver shows none")
    chosen: dict[Device, str] = {}
    for text in wanted:
        device = _one(gpus, text, found, visible)
        if device not in visible:
            raise SettingsError(
                f"gpus={gpus!r}: GPU {text} is hidden from this program by {VISIBLE}={environment[VISIBLE]!r}. Name "
                f"one that it shows ({_names(visible) or 'there is none'}), or change it"
            )
        if device in chosen:
            raise SettingsError(
                f"gpus={gpus!r}: GPU {text} is given twice ({chosen[device]} is the same). For several processes on "
                "one GPU: jobs_per_gpu="
            )
        chosen[device] = text
    return tuple(chosen)


@dataclass(frozen=True)
class Pinning:
    """Worker processes on GPUs: so many jobs on each device.

    Attributes
    ----------
    devices : tuple of Device
    jobs : int
        Processes on each.
    """

    devices: tuple[Device, ...]
    jobs: int = 1

    @classmethod
    def of(cls, gpus: Any, jobs_per_gpu: Any) -> Pinning | None:
        """The pinning that ``gpus`` and ``jobs_per_gpu`` ask of this machine; None for ``gpus=None``.

        Raises
        ------
        SettingsError
            As `choose` and `inventory`, or a number of jobs that is none.
        """
        if isinstance(jobs_per_gpu, bool) or not isinstance(jobs_per_gpu, int) or jobs_per_gpu < 1:
            raise SettingsError(
                f"jobs_per_gpu is {jobs_per_gpu!r}: give the number of processes on each GPU, 1 or more"
            )
        if gpus is None:
            if jobs_per_gpu != 1:
                raise SettingsError(f"jobs_per_gpu={jobs_per_gpu} needs GPUs to be on: give gpus='all', or name some")
            return None
        _listed(gpus)  # what is no name at all is refused before NVML is asked
        return cls(choose(gpus, inventory(), own_environment()), jobs_per_gpu)

    def __len__(self) -> int:
        return len(self.devices) * self.jobs

    def workers(self, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Name, environment and resources of each worker, by its name; the first jobs of all devices come first.

        Devices are named by UUID: a number means another card where CUDA counts otherwise, as a daemon of MPS does.
        """
        return {
            name: {
                "name": name,
                "env": {VISIBLE: device.uuid, ORDER: BY_PLACE},
                "resources": {"GPU": 1 / self.jobs},
            }
            for job in range(self.jobs)
            for device in self.devices
            for name in [f"{prefix}{device.label}-job{job}"]
        }

    def told(self) -> list[str]:
        """A line for each device: what it is, how many jobs, and near which CPUs."""
        jobs = "1 job" if self.jobs == 1 else f"{self.jobs} jobs"
        return [
            f"GPU {device}, {jobs}, " + (f"CPUs {spans(cpus)}" if cpus else f"not bound to CPUs: {why}")
            for device in self.devices
            for cpus, why in [usable_cpus(device)]
        ]


def usable_cpus(device: Device) -> tuple[frozenset[int], str]:
    """CPUs near a device that this process may use; where there are none, why."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    near = device.cpus & allowed
    if near or not device.cpus:
        return near, device.unbound
    return near, f"this process may not use CPUs {spans(device.cpus)}, which are near it"


def bind_to_device(environment: Mapping[str, str] | None = None) -> tuple[frozenset[int], str]:
    """Keep all threads of this process, and what it starts, on the CPUs near its GPU: the first that CUDA shows it.

    Returns
    -------
    cpus : frozenset of int
        Empty where nothing was changed.
    reason : str
        Why not; empty also where this process has no GPU of its own.
    """
    environment = os.environ if environment is None else environment
    if not environment.get(VISIBLE, "").strip().startswith(("GPU-", "MIG-", *"0123456789")):
        return frozenset(), ""
    try:
        visible = inventory().visible(environment)
    except SettingsError as error:
        return frozenset(), str(error)
    if not visible:
        return frozenset(), f"NVML knows no GPU of {VISIBLE}={environment[VISIBLE]!r}"
    cpus, reason = usable_cpus(visible[0])
    if cpus:
        # Libraries that the script imports have started threads of their own by now.
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cpus)
    return cpus, reason


# What the variables were of which `starting_with` has changed some; None: not set
_changed: dict[str, str | None] = {}


@contextmanager
def starting_with(variables: Mapping[str, str]) -> Iterator[None]:
    """Context in which processes that this one starts are born with these variables. One at a time."""
    _changed.update({name: os.environ.get(name) for name in variables})
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            before = _changed[name]
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before
        _changed.clear()


def own_environment() -> dict[str, str]:
    """Environment of this process, without what is there only for the process that it starts now."""
    before = {**os.environ, **_changed}
    return {name: value for name, value in before.items() if value is not None}


def spans(numbers: Iterable[int]) -> str:
    """Numbers as text.

    Examples
    --------
    >>> spans({0, 1, 2, 8, 10, 11})
    '0-2,8,10-11'
    """
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _listed(gpus: Any) -> list[str]:
    """What was asked for as texts: numbers, UUIDs, or "all" alone."""
    parts: Sequence[Any] = [gpus] if isinstance(gpus, int | str) else list(gpus) if _is_sequence(gpus) else [None]
    texts = [
        text.strip()
        for item in parts
        for text in (item.split(",") if isinstance(item, str) else [str(item) if _is_number(item) else ""])
    ]
    if texts != ["all"] and not (texts and all(t.isdecimal() or t.startswith(("GPU-", "MIG-")) for t in texts)):
        raise SettingsError(
            f"gpus={gpus!r}: give 'all', or name GPUs by number (as nvidia-smi counts) or by UUID: [0, 1], 'GPU-...', "
            "'MIG-...'"
        )
    return texts


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, bytes | Mapping)


def _is_number(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _one(gpus: Any, text: str, found: Inventory, visible: Sequence[Device]) -> Device:
    named = found.named(text)
    cards = [card for card, uuid in found.split.items() if text == str(card) or uuid.startswith(text)]
    if cards:
        instances = ", ".join(device.uuid for device in found.devices if device.card in cards)
        raise SettingsError(
            f"gpus={gpus!r}: GPU {text} is in MIG mode, where a process gets one of its instances: "
            + (f"name some of {instances}" if instances else "it has none yet (nvidia-smi mig makes them)")
        )
    if text.isdecimal() and int(text) in found.lost:
        raise SettingsError(f"gpus={gpus!r}: GPU {text} cannot be used: {found.lost[int(text)]}")
    if not named:
        there = _names(visible) or "none"
        raise SettingsError(f"gpus={gpus!r}: there is no GPU {text} on this machine. Those that there are: {there}")
    if len(named) > 1:
        raise SettingsError(f"gpus={gpus!r}: several begin with {text}: {_names(named)}. Give more of it")
    return named[0]


def _names(devices: Iterable[Device]) -> str:
    return ", ".join(map(str, devices))
