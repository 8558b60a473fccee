"""What no pickle carries: TorchScript modules and exported programs, carried whole, as torch's own bytes.

Their bytes are shared; what torch's own loader makes of them is private to each process, and said to be.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from itertools import groupby
from typing import Any

import torch
from torch.export import ExportedProgram

# What is random, or says where the source lay.
_INCIDENTAL = ("serialization_id", ".debug_pkl", "byteorder", "version")

# Names of classes and functions of TorchScript, and the numbers in them that torch gives by process.
_QUALIFIED = re.compile(r"__torch__(?:\.\w+)+")
_MANGLED = re.compile(r"\.___torch_mangle_\d+")


def is_program(obj: Any) -> bool:
    """Whether ``obj`` is carried as bytes of torch's own format."""
    return isinstance(obj, torch.jit.ScriptModule | ExportedProgram)


def program_bytes(program: Any) -> bytes:
    """The program in torch's own format.

    Raises
    ------
    RuntimeError
        Torch cannot save it.
    """
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as such, which is not ours to tell
        if isinstance(program, ExportedProgram):
            torch.export.save(program, file)
        else:
            torch.jit.save(program, file)
    return file.getvalue()


def as_tensor(content: bytes) -> torch.Tensor:
    """These bytes as a tensor (uint8)."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def load_script(content: torch.Tensor) -> torch.nn.Module:
    """The TorchScript module of these bytes (uint8)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module: torch.nn.Module = torch.jit.load(_file(content))  # type: ignore[no-untyped-call]
    return module


def lost_attributes(script: Any, content: bytes) -> list[str]:
    """Names of the attributes of a TorchScript module that its bytes do not carry."""
    loaded = load_script(as_tensor(content))
    return sorted(name for name in vars(script) if not hasattr(loaded, name))


def load_exported(content: torch.Tensor) -> torch.nn.Module:
    """The module of the exported program of these bytes (uint8)."""
    module: torch.nn.Module = torch.export.load(_file(content)).module()
    return module


def _file(content: torch.Tensor) -> io.BytesIO:
    if type(content) is not torch.Tensor:
        raise NotImplementedError("a program cannot be loaded without its bytes")
    array: Any = content.numpy()
    return io.BytesIO(array)


def program_digest(program: Any, content: bytes) -> bytes:
    """SHA-256 of a program's code, state and tensors; equal in all processes, and for what was saved and loaded.

    Parameters
    ----------
    program : torch.jit.ScriptModule or torch.export.ExportedProgram
    content : bytes
        Its `program_bytes`.
    """
    if isinstance(program, ExportedProgram):
        return _zip_digest(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    # Classes and functions are numbered as they are met, from the root on: torch's own numbers depend on what else
    # the process has compiled, and without any two classes of one name could not be told apart.
    numbers: dict[str, int] = {}

    def numbered(text: str) -> str:
        return _QUALIFIED.sub(
            lambda name: f"{_MANGLED.sub('', name[0])}#{numbers.setdefault(name[0], len(numbers))}", text
        )

    found = [numbered(_Plain(records[name], records).text()) for name in ("data.pkl", "constants.pkl")]
    files: list[str] = []
    met = 0
    while met < len(numbers):
        module, _, name = list(numbers)[met].rpartition(".")
        met += 1
        file = f"code/{module.replace('.', '/')}.py"
        if file in records and file not in files:
            files.append(file)
            found.append(numbered(_in_order(records[file].decode())))
        found.append(f"{name} in {files.index(file) if file in files else ''}")
    return hashlib.sha256(repr(found).encode()).digest()


def _zip_digest(content: bytes) -> bytes:
    """SHA-256 of all records of an archive, and of the archives among them."""
    total = hashlib.sha256()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(_INCIDENTAL):
                record = archive.read(name)
                nested = zipfile.is_zipfile(io.BytesIO(record))
                digest = _zip_digest(record) if nested else hashlib.sha256(record).digest()
                total.update(hashlib.sha256(name.partition("/")[2].encode()).digest() + digest)
    return total.digest()


def _in_order(code: str) -> str:
    """Code with the constants of each class in order, which torch takes from a set."""
    groups = groupby(code.splitlines(), lambda line: " : Final[" in line)
    return "\n".join(line for constants, lines in groups for line in (sorted(lines) if constants else lines))


class _Made:
    """What a pickle makes by calling something: what was called, with what, and the state it was given."""

    name = ""
    parts: list[Any]

    def __new__(cls, *arguments: Any) -> _Made:
        made = super().__new__(cls)
        made.parts = [cls.name, *arguments]
        return made

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts.append((key, value))

    def __repr__(self) -> str:
        return f"<{self.parts!r}>"


class _Plain(pickle.Unpickler):
    """A pickle of a TorchScript archive as text, without calling anything that it names."""

    def __init__(self, content: bytes, records: dict[str, bytes]):
        super().__init__(io.BytesIO(content))
        self._records = records

    def text(self) -> str:
        return repr(self.load())

    def find_class(self, module: str, name: str) -> Any:
        return type("Made", (_Made,), {"name": f"{module}.{name}", "__module__": __name__})

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, device, length = pid
        content = next((self._records[f"{place}/{key}"] for place in ("data", "constants")
                        if f"{place}/{key}" in self._records), b"")  # fmt: skip
        return (kind.name, hashlib.sha256(content).hexdigest(), device, length)
