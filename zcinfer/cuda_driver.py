"""The few calls of CUDA's driver library by which processes share memory of a card, by ctypes and without torch.

Torch's own sharing counts consumers in memory that they share, and loses count when one is killed; an allocation of the
driver's is whole, is nobody else's, and is freed by who made it. Not for computing; NVML is asked elsewhere (`device`).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from .errors import StoreUnavailable

LIBRARY = "libcuda.so.1"
# Allocations below it share a block of the driver's, and a handle shows the whole of a block
GRANULE = 2 << 20
OUT_OF_MEMORY = 2
_IPC_SUPPORTED = 125  # CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED
_LAZY_PEER_ACCESS = 1  # the only flag that opening a handle may have

_POINTER, _SIZE, _CONTEXT, _INT = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int


class _Uuid(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * 16),)


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * 64),)


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (ctypes.POINTER(_INT), _INT),
    "cuDeviceGetUuid_v2": (ctypes.POINTER(_Uuid), _INT),
    "cuDeviceGetAttribute": (ctypes.POINTER(_INT), _INT, _INT),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_CONTEXT), _INT),
    "cuCtxPushCurrent_v2": (_CONTEXT,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(_CONTEXT),),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)),
    "cuMemAlloc_v2": (ctypes.POINTER(_POINTER), _SIZE),
    "cuMemFree_v2": (_POINTER,),
    "cuIpcGetMemHandle": (ctypes.POINTER(_Handle), _POINTER),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(_POINTER), _Handle, ctypes.c_uint),
    "cuIpcCloseMemHandle": (_POINTER,),
    "cuGetErrorName": (_INT, ctypes.POINTER(ctypes.c_char_p)),
}


class DriverError(StoreUnavailable):
    """A call of the driver library failed, or there is none."""

    def __init__(self, message: str, code: int = -1):
        super().__init__(message)
        self.code = code


class Driver:
    """A card, as the driver library counts those that this process sees.

    Parameters
    ----------
    number : int

    Raises
    ------
    DriverError
        There is no driver, no such card, or its memory cannot be shared.
    """

    def __init__(self, number: int = 0):
        try:
            self._library = ctypes.CDLL(LIBRARY)
            for name, arguments in _SIGNATURES.items():
                getattr(self._library, name).argtypes = arguments
        except (OSError, AttributeError) as error:
            raise DriverError(f"the CUDA driver's library cannot be used: {error}") from error
        self._call("cuInit", 0)
        device, supported, uuid = _INT(), _INT(), _Uuid()
        self._call("cuDeviceGet", ctypes.byref(device), number)
        self._call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
        text = bytes(uuid.bytes).hex()
        self.uuid = "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
        self._call("cuDeviceGetAttribute", ctypes.byref(supported), _IPC_SUPPORTED, device)
        if not supported.value:
            raise DriverError(f"{self.uuid} shares no memory between processes, by its driver")
        # The one that torch computes in
        self._context = _CONTEXT()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def total(self) -> int:
        """Bytes of the card."""
        free, total = _SIZE(), _SIZE()
        with self._current():
            self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value

    def allocate(self, nbytes: int) -> tuple[int, bytes]:
        """New memory: its address in this process, and the handle by which other processes open it."""
        pointer, handle = _POINTER(), _Handle()
        with self._current():
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), -(-max(1, nbytes) // GRANULE) * GRANULE)
            try:
                self._call("cuIpcGetMemHandle", ctypes.byref(handle), pointer)
            except DriverError:
                self._call("cuMemFree_v2", pointer)
                raise
        return pointer.value, bytes(handle.bytes)

    def free(self, pointer: int) -> None:
        """Give memory of `allocate` back."""
        with self._current():
            self._call("cuMemFree_v2", pointer)

    def open(self, handle: bytes) -> int:
        """Address in this process of what another allocated."""
        pointer, given = _POINTER(), _Handle()
        if len(handle) != ctypes.sizeof(given):
            raise DriverError(f"a handle has {len(handle)} bytes")
        ctypes.memmove(ctypes.byref(given), handle, len(handle))
        with self._current():
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), given, _LAZY_PEER_ACCESS)
        return pointer.value

    def close(self, pointer: int) -> None:
        """Let go of what `open` gave, when all that this process has queued is done."""
        with self._current():
            self._call("cuCtxSynchronize")
            self._call("cuIpcCloseMemHandle", pointer)

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Have this thread call on behalf of the card's context, and leave it with the one it had."""
        popped = _CONTEXT()
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(popped))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            told = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(told))
            raise DriverError(f"{name}: {(told.value or b'error').decode()} ({code})", code)


_lock = threading.Lock()


@cache
def _driver(number: int) -> Driver:
    return Driver(number)


def driver(number: int) -> Driver:
    """The card of that number, one for all threads of this process."""
    with _lock:
        return _driver(number)
