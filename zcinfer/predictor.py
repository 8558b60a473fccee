"""The callable that runs a model on one block: cast, cut into batches, forward, pick the output, back to NumPy.

It carries a `ModelRef`, never weights. Before any work it is *bound* to the inputs' row shapes: the output's shape and
dtype are found without weights, so that lazy arrays know theirs. Works without Dask; not for graphs (`arrays`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .canonical import Canonical
from .catalog import describe, ready
from .description import sha256_each
from .errors import BlockError, InputError, OutputError, SettingsError, TrainingModeError, ZcinferError
from .loading import device_of, residents
from .outputs import Output, OutputFunctionError, choose, rows_axis
from .parts import storage_bytes
from .probing import explain, furthest, weightless
from .rows import Array, Rows, as_block, candidate_casts, first_rows, rows_of, to_numpy, to_tensor, two_rows, zeros
from .store import ModelRef

log = logging.getLogger("zcinfer")


# "auto" starts from the bytes of a row: activations grow with them, and small rows need many to a batch.
_AUTO_BYTES, _AUTO_LEAST, _AUTO_MOST = 256 << 10, 8, 1024
_TORCH_INTEGERS = frozenset(("uint8", "int8", "int16", "int32", "int64"))


@dataclass(frozen=True)
class Binding:
    """What was found for given inputs.

    Attributes
    ----------
    inputs : tuple of Rows
        As they come.
    casts : tuple of str
        torch's name of the dtype that each input is cast to.
    output : Rows
        As it goes out.
    batch_size : int
        Rows that one forward gets, at most.
    """

    inputs: tuple[Rows, ...]
    casts: tuple[str, ...]
    output: Rows
    batch_size: int


class Predictor:
    """A model as a function on blocks of rows.

    Parameters
    ----------
    model : str or ModelRef
        A name means its newest version now.
    batch_size : int or "auto"
        Rows that one forward gets. "auto": a power of two between 8 and 1,024, by the bytes of a row.
    output : str, int or callable, optional
        Which output: a key or attribute, a position, or a function ``f(output, inputs) -> tensor``, where ``inputs``
        are the tensors that the model got (a tuple, or a dict if they went by keyword). Default: the only tensor.
    method : str
        Method of the model to call.
    training : {"refuse", "eval", "keep"}
        What to do with a model that has submodules in train mode.
    device : str, optional
        Default: "cuda" where there is one, else "cpu".
    keywords : sequence of str
        Names under which the last inputs go to the model.
    **constants
        Passed to the model as they are.

    Raises
    ------
    ModelNotFound, TrainingModeError, SettingsError

    Examples
    --------
    >>> import numpy as np, torch, zcinfer as zc
    >>> _ = zc.connect("file"), zc.put(torch.nn.Linear(4, 2).eval(), "doc-predictor")
    >>> p = Predictor("doc-predictor")
    >>> p(np.ones((10, 4), np.float32)).shape
    (10, 2)
    """

    def __init__(
        self,
        model: str | ModelRef,
        *,
        batch_size: int | str = "auto",
        output: Output = None,
        method: str = "forward",
        training: str = "refuse",
        device: str | None = None,
        keywords: Sequence[str] = (),
        **constants: Any,
    ):
        if batch_size != "auto" and not (isinstance(batch_size, int | np.integer) and batch_size > 0):
            raise SettingsError(f"batch_size is {batch_size!r}: give a number of rows, or 'auto'")
        if training not in ("refuse", "eval", "keep"):
            raise SettingsError(f"training is {training!r}: choose 'refuse', 'eval' or 'keep'")
        device_of(device)
        self.ref = ready(model)
        self.batch_size = batch_size if isinstance(batch_size, str) else int(batch_size)
        self.output = output
        self.method = method
        self.training = training
        self.device = device
        self.keywords = tuple(keywords)
        self.constants = constants
        self.binding: Binding | None = None
        self._found: dict[tuple[Any, ...], Binding] = {}
        description, _ = describe(self.ref)
        if description.training and training == "refuse":
            names = ", ".join(repr(name) if name else "the model itself" for name in description.training[:3])
            raise TrainingModeError(
                f"{self.ref} has {len(description.training)} submodules in train mode ({names}...): their answers may "
                "depend on the batch. Call model.eval() before you put it, or say training='eval' (or 'keep')."
            )

    def __repr__(self) -> str:
        return f"Predictor({str(self.ref)!r}, batch_size={self.batch_size!r})"

    __name__ = "predict"  # what dask calls the tasks of a plain map_blocks

    def __dask_tokenize__(self) -> tuple[str, str]:
        return ("zcinfer.Predictor", self.fingerprint())

    def fingerprint(self) -> str:
        """SHA-256 of model and settings; the same in every process, also with functions of ``__main__``."""
        canonical = Canonical(lambda storage: sha256_each([storage_bytes(storage)])[0])
        settings = (self.output, self.method, self.training, self.device, self.keywords, self.constants)
        casts = self.binding and (self.binding.casts, self.binding.batch_size)
        canonical.add((self.ref.digest, self.batch_size, settings, casts))
        return canonical.hexdigest()

    def bind(self, inputs: Sequence[Rows], sample: Callable[[], Sequence[Array]] | None = None) -> Predictor:
        """The predictor for inputs of these row shapes and dtypes, with its output's shape and dtype found.

        Parameters
        ----------
        inputs : sequence of Rows
            Positional ones first, then those of ``keywords``.
        sample : callable, optional
            Gives some real rows of each input, ``(rows, ...)``; asked for only where the model's branches depend
            on data, so that its output's shape cannot be found without running it. Default: zeros.

        Returns
        -------
        Predictor

        Raises
        ------
        InputError
            The model refuses such rows.
        OutputError
            Its output has no rows, or several outputs and none was chosen.
        """
        known = self._found.get((self.keywords, *inputs))
        if known is not None:
            return self._with(known, inputs)
        for number, rows in enumerate(inputs):
            if rows.dtype.kind not in "biufc":
                raise InputError(
                    f"{self._input_name(number, len(inputs))} has dtype {rows.dtype}, which is not numeric: convert it "
                    "first, for example with .astype('float32')"
                )
        description, skeleton = describe(self.ref)
        failures: list[Exception] = []
        candidates = list(candidate_casts(inputs, description.dtype))

        def attempt(run: Callable[[tuple[str, ...]], Rows]) -> Binding | None:
            for casts in candidates:
                try:
                    output = run(casts)
                except ZcinferError:
                    raise
                except Exception as error:
                    failures.append(error)
                else:
                    return Binding(tuple(inputs), casts, output, self._batch_rows(inputs))
            return None

        binding = attempt(lambda casts: self._output_of_fake(inputs, casts, description, skeleton))
        if binding is None:
            two = [two_rows(r, array) for r, array in zip(inputs, sample() if sample else zeros(inputs), strict=True)]
            binding = attempt(lambda casts: self._output_of_real(two, casts))
            if binding is None:
                found = ", ".join(
                    f"{self._input_name(number, len(inputs))} {rows}" for number, rows in enumerate(inputs)
                )
                failure = furthest(failures[len(failures) // 2 :])  # those on real rows
                if isinstance(failure, OutputFunctionError):
                    raise OutputError(f"{self.ref}: {failure}") from failure
                raise InputError(
                    f"{self.ref} ({description.class_name}) does not take these inputs: found {found}; "
                    f"{explain(failure)}. Give rows of the shape and dtype that the model was made for."
                ) from failure
            log.info(
                "the output of %s could not be found without weights (%s); two rows were run on the CPU",
                self.ref,
                type(failures[0]).__name__,
            )
        return self._with(binding, inputs)

    def _with(self, binding: Binding, inputs: Sequence[Rows]) -> Predictor:
        self._found[self.keywords, *inputs] = binding
        bound = copy.copy(self)
        bound.binding = binding
        return bound

    def like(self, *arrays: Any) -> dict[str, Any]:
        """Keywords for ``x.map_blocks(p, **p.like(x))``: dtype, meta, chunks and changed axes of the result.

        Parameters
        ----------
        *arrays : dask.array.Array
            As they will be passed; all axes but the first in one chunk, and all of as many axes, since ``map_blocks``
            aligns the last ones. (`predict` takes any, and inputs by name.)
        """
        if len({array.ndim for array in arrays}) != 1:
            raise InputError(
                "map_blocks would not align the rows of inputs with different numbers of axes: use zcinfer.predict"
            )
        for array in arrays:
            if not hasattr(array, "chunks"):
                raise InputError(
                    f"an input is a {type(array).__name__}: give dask arrays, or call the predictor itself"
                )
            if any(len(lengths) > 1 for lengths in array.chunks[1:]):
                axes = dict.fromkeys(range(1, array.ndim), -1)
                raise InputError(f"the axes after the first are cut into several chunks: use x.rechunk({axes})")
        binding = self.bind([rows_of(a) for a in arrays], lambda: [first_rows(a) for a in arrays]).binding
        assert binding is not None
        shape, ndim = binding.output.shape, arrays[0].ndim
        return {
            "dtype": binding.output.dtype,
            "meta": np.empty((0,) * (1 + len(shape)), binding.output.dtype),
            "chunks": (arrays[0].chunks[0], *((n,) for n in shape)),
            "drop_axis": list(range(1, ndim)),
            "new_axis": list(range(1, 1 + len(shape))),
            "binding": binding,
        }

    def __call__(
        self,
        *blocks: Array,
        binding: Binding | None = None,
        block_id: tuple[int, ...] | None = None,
        **inputs: Array,
    ) -> Array:
        """Run the model on blocks of rows.

        Parameters
        ----------
        *blocks, **inputs : numpy.ndarray
            ``(rows, ...)`` each, with equal numbers of rows.
        binding : Binding, optional
            From `like`. Default: found at the first call for rows of a kind, and remembered.
        block_id : tuple of int, optional
            Given by ``map_blocks``.

        Returns
        -------
        numpy.ndarray
            ``(rows, ...)``; bfloat16 comes back as float32, which NumPy has.

        Raises
        ------
        InputError, BlockError
        """
        predictor = copy.copy(self)
        predictor.keywords = tuple(inputs) or self.keywords
        predictor.binding = binding or self.binding
        if block_id is None:
            return predictor.run_block((*blocks, *inputs.values()), "the rows given")
        return predictor.run_block((*blocks, *inputs.values()), f"block {block_id[0]}", first_row=None)

    def run_block(self, blocks: Sequence[Array], where: str, first_row: int | None = 0) -> Array:
        """Run the model on one block.

        Parameters
        ----------
        blocks : sequence of numpy.ndarray
            Positional inputs first, then those of ``keywords``.
        where : str
            What to call the block in errors.
        first_row : int, optional
            Number of the block's first row in the whole array; None: not known.
        """
        blocks = [as_block(block, self._input_name(number, len(blocks))) for number, block in enumerate(blocks)]
        found = tuple(rows_of(block) for block in blocks)
        lengths = sorted({len(block) for block in blocks})
        if len(lengths) > 1:
            raise InputError(f"{where}: the inputs have different numbers of rows, {lengths}")
        bound = self if self.binding and self.binding.inputs == found else self.bind(found, lambda: blocks)
        binding = bound.binding
        assert binding is not None
        result = np.empty((lengths[0], *binding.output.shape), binding.output.dtype)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if lengths[0] == 0:
            return result
        try:
            with residents.lend(self.ref, device, self.training) as model, torch.inference_mode():
                for start in range(0, lengths[0], binding.batch_size):
                    stop = min(start + binding.batch_size, lengths[0])
                    span = f"{where}, rows {_span(start, stop, first_row)}, of {self.ref}"
                    try:
                        tensors = [
                            to_tensor(b[start:stop], c, device) for b, c in zip(blocks, binding.casts, strict=True)
                        ]
                        batch = to_numpy(bound._forward(model, tensors))
                    except Exception as error:
                        raise BlockError(f"{span}: {explain(error)}") from error
                    if stop - start == 1 and batch.shape == binding.output.shape:
                        batch = batch[None]  # squeezed away by the model, with axes that it means to
                    if batch.shape != (stop - start, *binding.output.shape):
                        raise BlockError(
                            f"{span}: the output has shape {batch.shape}, expected ({stop - start}, ...) as "
                            f"{binding.output}, found before the job began"
                        )
                    result[start:stop] = batch
        except ZcinferError:
            raise
        except Exception as error:
            raise BlockError(f"{where}: {self.ref} cannot be used on {device}: {explain(error)}") from error
        return result

    def _forward(self, model: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        positional = len(tensors) - len(self.keywords)
        named = dict(zip(self.keywords, tensors[positional:], strict=True))
        function = model if self.method == "forward" else getattr(model, self.method, None)
        if not callable(function):
            raise SettingsError(f"{type(model).__name__} has no method {self.method!r}")
        output = function(*tensors[:positional], **named, **self.constants)
        inputs: Any = {**dict(enumerate(tensors[:positional])), **named} if named else tuple(tensors)
        return choose(output, self.output, inputs)

    def _output_of_fake(
        self, inputs: Sequence[Rows], casts: tuple[str, ...], description: Any, skeleton: bytes
    ) -> Rows:
        shapes = []
        for rows in (2, 3):
            with weightless(skeleton, description) as model:
                if self.training == "eval":
                    model.eval()
                tensors = [
                    torch.empty((rows, *r.shape), dtype=getattr(torch, cast))
                    for r, cast in zip(inputs, casts, strict=True)
                ]
                output = self._forward(model, tensors)
                shapes.append((tuple(int(n) for n in output.shape), output.dtype))
        return rows_axis(shapes, (2, 3), self.ref)

    def _output_of_real(self, rows: Sequence[Array], casts: tuple[str, ...]) -> Rows:
        shapes = []
        with residents.lend(self.ref, "cpu", self.training) as model, torch.inference_mode():
            for count in (1, 2):
                tensors = [to_tensor(r[:count], c, "cpu") for r, c in zip(rows, casts, strict=True)]
                output = self._forward(model, tensors)
                shapes.append((tuple(output.shape), output.dtype))
        return rows_axis(shapes, (1, 2), self.ref)

    def _batch_rows(self, inputs: Sequence[Rows]) -> int:
        if isinstance(self.batch_size, int):
            return self.batch_size
        rows = max(1, _AUTO_BYTES // max(1, sum(r.nbytes for r in inputs)))
        return min(_AUTO_MOST, max(_AUTO_LEAST, 1 << (rows.bit_length() - 1)))

    def _input_name(self, number: int, total: int) -> str:
        positional = total - len(self.keywords)
        return f"input {number}" if number < positional else repr(self.keywords[number - positional])


def _span(start: int, stop: int, first_row: int | None) -> str:
    if first_row is None:
        return f"{start:,}–{stop - 1:,} of the block"
    return f"{first_row + start:,}–{first_row + stop - 1:,}"
