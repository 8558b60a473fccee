"""What is known of a model without loading it: digest, tensor table, what it needs. Torch is not imported here,
so that the process that owns the shared memory stays small; the table is checked before any view is made of it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .errors import ArchiveError
from .files import FileBytes

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

# cublasLt picks its algorithm by the alignment of each pointer, up to 256 bytes; CPU vector loads want 64.
ALIGNMENT = 256

# Bytes behind the last storage: pages are protected as a whole, and no other object may lie in the last one.
TAIL = 4096

# Torch counts in signed integers of 64 bits; NumPy makes no arrays of more axes.
_LARGEST, _MOST_AXES = (1 << 63) - 1, 64

# Storages are hashed in pieces, so that several threads can share one large storage.
_HASH_PIECE = 16 << 20

# Bytes an element takes, by torch's name of the dtype.
ITEMSIZE = {
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32", "qint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16", "bits16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "qint8", "quint8", "quint4x2", "quint2x4", "bits8", "bits4x2"), 1),
    **dict.fromkeys(("bits2x4", "bits1x8", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
}


# Those that torch.frombuffer takes in every version we support; tensors of others are set on bare storages.
BUFFER_DTYPES = frozenset(
    ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
)


# Of these, the ones that NumPy has.
_NUMPY = {name: np.dtype(name) for name in BUFFER_DTYPES - {"bfloat16"}}


def is_digest(text: str) -> bool:
    """Whether a text can be the digest of a model: SHA-256, as lower-case hexadecimal digits."""
    return bool(re.fullmatch("[0-9a-f]{64}", text))


class TensorSpec(NamedTuple):
    """One tensor as a view of a storage: ``offset``, ``size`` and ``stride`` count elements of ``dtype``.

    ``whole``: contiguous, of one of the `BUFFER_DTYPES`, covers its storage, and shares it with no other tensor.
    """

    storage: int
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    parameter: bool
    whole: bool


class StorageSpec(NamedTuple):
    """One storage: its place in the flat buffer (bytes), its content's SHA-256 and a name for people."""

    offset: int
    nbytes: int
    sha256: str
    name: str


class Columns(NamedTuple):
    """Numbers, sizes, dtypes and places (bytes) of tensors; numbers of the parameters, and of what wants gradients."""

    numbers: list[int]
    sizes: list[tuple[int, ...]]
    dtypes: list[np.dtype[Any]]
    in_base: list[bool]
    offsets: list[int]
    parameters: list[int]
    with_gradient: list[int]


@dataclass(frozen=True)
class Description:
    """What is known of a model without loading it; small, and safe to read from anybody.

    Attributes
    ----------
    digest : str
        SHA-256 of the canonical form of the model.
    class_name : str
        Qualified name of the model's class.
    tensors, storages : tuple
        The table.
    nbytes : int
        Length of the flat buffer in bytes.
    skeleton_sha256 : str
        SHA-256 of the skeleton's bytes.
    skeleton_nbytes : int
        Length of the skeleton in bytes: what each process holds for itself.
    training : tuple of str
        Names of the submodules in train mode ("" is the model itself).
    dtype : str
        Floating dtype of the first parameter that has one ("float32"), or "".
    requires : dict of str to str
        Top-level package of each class and function in the skeleton, and its version where it has one.
    private : tuple of (str, int)
        What of the model no reader can share, and its bytes: each process holds them for itself.
    in_base : tuple of int
        Numbers of the storages that lie in another model's buffer; none in an archive.
    """

    digest: str
    class_name: str
    tensors: tuple[TensorSpec, ...]
    storages: tuple[StorageSpec, ...]
    nbytes: int
    skeleton_sha256: str
    skeleton_nbytes: int
    training: tuple[str, ...]
    dtype: str
    requires: dict[str, str]
    private: tuple[tuple[str, int], ...] = ()
    in_base: tuple[int, ...] = ()

    @cached_property
    def columns(self) -> Columns:
        """The tensors that NumPy can make arrays of, by column: thousands of loads go through them."""
        numbers = [n for n, t in enumerate(self.tensors) if t.whole and t.dtype in _NUMPY]
        tensors = [self.tensors[n] for n in numbers]
        return Columns(
            numbers,
            [tensor.size for tensor in tensors],
            [_NUMPY[tensor.dtype] for tensor in tensors],
            [tensor.storage in self.in_base for tensor in tensors],
            [self.storages[tensor.storage].offset for tensor in tensors],
            [n for n, tensor in enumerate(self.tensors) if tensor.parameter],
            [n for n, tensor in enumerate(self.tensors) if tensor.requires_grad],
        )

    def over(self, base: Description, own: bool = True) -> Description:
        """The same model with the storages that ``base`` has too lying in the buffer of ``base``.

        Parameters
        ----------
        base : Description
        own : bool
            Place the others in a buffer of their own, one after the other; else they stay where they are.
        """
        # Each place serves once: two tensors of equal content must not become one memory.
        places: dict[tuple[str, int], dict[str, int]] = {}
        for spec in base.storages:
            if spec.nbytes:
                places.setdefault((spec.sha256, spec.nbytes), {})[spec.name] = spec.offset
        storages, in_base, position = list(self.storages), [], 0
        # Those of the same name first, lest another takes their place.
        named = [n for n, spec in enumerate(storages) if spec.name in places.get((spec.sha256, spec.nbytes), ())]
        for number in dict.fromkeys([*named, *range(len(storages))]):
            spec = storages[number]
            free = places.get((spec.sha256, spec.nbytes))
            if free:
                offset = free.pop(spec.name) if spec.name in free else free.popitem()[1]
                storages[number] = spec._replace(offset=offset)
                in_base.append(number)
        for number in sorted(set(range(len(storages))) - set(in_base)) if own else ():
            storages[number] = storages[number]._replace(offset=position)
            position += -(-storages[number].nbytes // ALIGNMENT) * ALIGNMENT
        nbytes = position + TAIL if own else self.nbytes
        return replace(self, storages=tuple(storages), nbytes=nbytes, in_base=tuple(sorted(in_base)))

    @property
    def private_nbytes(self) -> int:
        """Bytes that each process holds for itself: the skeleton, and what of the model cannot be shared."""
        return max(self.skeleton_nbytes, sum(nbytes for _, nbytes in self.private))

    @property
    def nbytes_in_base(self) -> int:
        """Bytes of the storages that lie in another model's buffer."""
        return sum(self.storages[number].nbytes for number in self.in_base)

    @classmethod
    def from_json(cls, value: dict[str, Any], check: bool = True) -> Description:
        """Inverse of ``dataclasses.asdict`` over JSON; checked unless it was before."""
        try:
            described = cls(
                **{
                    **value,
                    "tensors": tuple(map(TensorSpec._make, map(_with_tuples, value["tensors"]))),
                    "storages": tuple(map(StorageSpec._make, value["storages"])),
                    "training": tuple(value["training"]),
                    "requires": dict(value["requires"]),
                    "private": tuple((what, nbytes) for what, nbytes in value["private"]),
                    "in_base": tuple(value["in_base"]),
                }
            )
        except (TypeError, KeyError, ValueError, IndexError, OverflowError) as error:
            raise ArchiveError(f"the description of the model is malformed: {error}") from error
        if check:
            described.check()
        return described

    def check(self) -> None:
        """Refuse a table that does not fit its buffer, or has other types than the above.

        Raises
        ------
        ArchiveError
        """
        try:
            _check(self)
        except (TypeError, KeyError, ValueError, IndexError, OverflowError) as error:
            raise ArchiveError(f"the description of the model is malformed: {error}") from error


def _with_tuples(spec: list[Any]) -> list[Any]:
    spec[3:5] = map(tuple, spec[3:5])  # size and stride
    return spec


def _check(description: Description) -> None:
    """Refuse other types than the above, and tables whose views would reach outside the buffer: torch would follow."""
    texts = (description.class_name, description.dtype, description.skeleton_sha256)
    _only(str, (*texts, *description.training, *description.requires, *description.requires.values()))
    _only(str, (what for what, _ in description.private))
    _numbers((description.nbytes, description.skeleton_nbytes, *(nbytes for _, nbytes in description.private)))
    if description.in_base:
        raise ValueError("an archive is whole, and has no storages elsewhere")
    if not is_digest(description.digest):
        raise ValueError(f"the digest is {description.digest!r}")
    _numbers(number for storage in description.storages for number in storage[:2])
    _only(str, (text for storage in description.storages for text in storage[2:]))
    if len({storage.name for storage in description.storages}) < len(description.storages):
        raise ValueError("two storages have one name")
    # Without gaps: what has no digest is nothing but padding.
    end = 0
    for storage in description.storages:
        if storage.offset != -(-end // ALIGNMENT) * ALIGNMENT:
            raise ValueError(f"storage {storage.name!r} lies at byte {storage.offset}, the one before ends at {end}")
        end = storage.offset + storage.nbytes
    if description.nbytes != -(-end // ALIGNMENT) * ALIGNMENT + TAIL:
        raise ValueError(f"the storages end at byte {end} of {description.nbytes}")
    for tensor in description.tensors:
        if len(tensor.size) > _MOST_AXES or len(tensor.stride) != len(tensor.size):
            raise ValueError(f"a tensor has {len(tensor.size)} sizes and {len(tensor.stride)} strides")
    _numbers(number for t in description.tensors for number in (t.storage, t.offset, *t.size, *t.stride))
    _only(bool, (flag for t in description.tensors for flag in t[5:]))
    uses = Counter(tensor.storage for tensor in description.tensors)
    for tensor in description.tensors:
        _check_tensor(tensor, description.storages, uses[tensor.storage] == 1)


def _check_tensor(tensor: TensorSpec, storages: Sequence[StorageSpec], alone: bool) -> None:
    number, dtype, offset, size, stride, requires_grad, _, whole = tensor
    itemsize, nbytes = ITEMSIZE[dtype], storages[number].nbytes
    # Even where nothing is read.
    if max(offset, math.prod(length or 1 for length in size), *stride) * itemsize > _LARGEST:
        raise ValueError(f"{tensor} reaches beyond 64 bits")
    if whole:
        elements = 1
        for length, step in zip(reversed(size), reversed(stride), strict=True):
            if step != elements:
                raise ValueError(f"{tensor} is not contiguous")
            elements *= length
        if offset or elements * itemsize != nbytes or dtype not in BUFFER_DTYPES or not alone:
            raise ValueError(f"{tensor} does not have its storage of {nbytes} bytes for itself")
    else:
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if 0 not in size and (last + 1) * itemsize > nbytes:
            raise ValueError(f"{tensor} reaches beyond its storage of {nbytes} bytes")
    if requires_grad and not dtype.startswith(("float", "bfloat", "complex")):
        raise ValueError(f"{tensor} cannot require gradients")


def _only(kind: type, values: Iterable[Any]) -> None:
    others = set(map(type, values)) - {kind}
    if others:
        raise TypeError(f"found {', '.join(other.__name__ for other in others)} instead of {kind.__name__}")


def _numbers(values: Iterable[Any]) -> None:
    """Refuse what is no number of things, or of bytes."""
    values = list(values)
    _only(int, values)
    if values and not 0 <= min(values) <= max(values) <= _LARGEST:
        raise ValueError("a number is negative, or has more than 64 bits")


def sha256_each(sources: Sequence[Bytes | FileBytes], advance: Callable[[int], object] = int) -> list[bytes]:
    """SHA-256 over the SHA-256 of each piece of 16 MiB, per source, on all cores (hashlib releases the GIL).

    ``advance`` is called with the bytes of each piece that is done.
    """
    pieces = [
        (number, source[start : start + _HASH_PIECE])
        for number, source in enumerate(sources)
        for start in range(0, max(source.nbytes, 1), _HASH_PIECE)
    ]
    totals = [hashlib.sha256() for _ in sources]
    threads = ThreadPoolExecutor()

    def digest_of(numbered: tuple[int, Bytes | FileBytes]) -> bytes:
        piece: Any = numbered[1]
        return hashlib.sha256(piece.read() if isinstance(piece, FileBytes) else piece).digest()

    try:
        for (number, piece), digest in zip(pieces, threads.map(digest_of, pieces), strict=True):
            totals[number].update(digest)
            advance(piece.nbytes)
    finally:
        threads.shutdown(cancel_futures=True)  # after Ctrl-C there may be minutes of them
    return [total.digest() for total in totals]


def altered_storages(buffer: Bytes | FileBytes, description: Description) -> list[str]:
    """Names of the storages in a flat buffer whose content is not what the description says."""
    sources = [buffer[spec.offset : spec.offset + spec.nbytes] for spec in description.storages]
    found = sha256_each(sources)
    return [s.name for s, digest in zip(description.storages, found, strict=True) if digest.hex() != s.sha256]
