"""A model with its settings, as a callable on blocks of rows: what a graph carries to the workers.

It carries a `ModelRef`, never weights. Before any work it is *bound* to the inputs' row shapes (`binding`), so that
lazy arrays know theirs. Works without Dask. Not for graphs (`arrays`), nor for how a block is computed (`block`).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from . import engines, pipeline, telemetry
from .batches import mask_of
from .binding import Binding, find_binding, input_name
from .block import BlockRun, Span
from .calling import Call
from .canonical import Canonical
from .catalog import describe, ready
from .computing import computing
from .errors import InputError, SettingsError, TrainingModeError
from .loading import device_of, residents
from .outputs import Output
from .probing import explain
from .rows import Array, Rows, as_block, first_rows, rows_of, to_tensor
from .store import ModelRef
from .telemetry import Clock, Job
from .tuning import Place, Size, device_name, is_out_of_memory, jobs_here, measure, memory_budget

log = logging.getLogger("zcinfer")

# Where it does not pay to measure, "auto" goes by the bytes of a row: activations grow with them.
_AUTO_BYTES, _AUTO_LEAST, _AUTO_MOST = 256 << 10, 8, 1024
# Batches of that size that there must be before measuring pays.
_WORTH_MEASURING = 8


# What was found for inputs, by all predictors of this process: one that comes with every request, as a task's, finds it
# there, and need not run the model without weights. The least recently used go first.
_found: OrderedDict[tuple[Any, ...], Binding] = OrderedDict()
_FOUND_MOST = 1000
_lock = threading.Lock()


class Predictor:
    """A model as a function on blocks of rows.

    Parameters
    ----------
    model : str or ModelRef
        A name means its newest version now.
    batch_size : int or "auto"
        Rows that one forward gets. "auto": measured once for this model, rows of this kind and this device, and
        remembered beside the registry; by the bytes of a row where there are few rows.
    output : str, int or callable, or a list of them, optional
        Which output: a key or attribute, a position, or a function ``f(output, inputs) -> tensor``, where ``inputs``
        are the tensors that the model got (a tuple, or a dict if they went by keyword). A list: several outputs, as a
        tuple. Default: the only tensor.
    method : str
        Method of the model to call.
    training : {"refuse", "eval", "keep"}
        What to do with a model that has submodules in train mode.
    device : str, optional
        Default: "cuda" where there is one, else "cpu".
    preprocess : callable, optional
        ``f(*inputs)`` of NumPy rows, in the worker, batch by batch: gives an array of as many rows, a tuple of them,
        or a dict of them by the model's names. It is tried on zeros first, to find its shapes.
    postprocess : callable, optional
        ``f(*outputs)`` of NumPy rows: gives an array of as many rows, or a tuple of them. It is tried on zeros too.
    autocast : {"bfloat16", "float16"}, optional
        Let torch use this dtype in operators that can do with less precision.
    dtype : str, optional
        Floating dtype that floating outputs are given.
    engine : {"eager", "graph", "compile"}
        What runs the model's operators: torch, CUDA graphs of batches whose shape comes again (on a GPU), or
        ``torch.compile``. Another engine can change last bits. Batch sizes are measured with "eager".
    sort_by : str, optional
        "length", or the name of a mask ``(rows, tokens)``: rows of like length go into one batch, which is cut to its
        longest. Results are in the order of the inputs; positions that were cut off are zero in them.
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
    >>> p = Predictor("doc-predictor", postprocess=lambda y: y.argmax(axis=1))
    >>> p(np.ones((10, 4), np.float32)).shape
    (10,)
    """

    def __init__(
        self,
        model: str | ModelRef,
        *,
        batch_size: int | str = "auto",
        output: Output | Sequence[Output] = None,
        method: str = "forward",
        training: str = "refuse",
        device: str | None = None,
        preprocess: Callable[..., Any] | None = None,
        postprocess: Callable[..., Any] | None = None,
        autocast: str | None = None,
        dtype: str | None = None,
        engine: str = "eager",
        sort_by: str | None = None,
        keywords: Sequence[str] = (),
        **constants: Any,
    ):
        if batch_size != "auto" and not (isinstance(batch_size, int | np.integer) and batch_size > 0):
            raise SettingsError(f"batch_size is {batch_size!r}: give a number of rows, or 'auto'")
        if training not in ("refuse", "eval", "keep"):
            raise SettingsError(f"training is {training!r}: choose 'refuse', 'eval' or 'keep'")
        device_of(device)
        engines.check(engine, device)
        self.call = Call(method, output, preprocess, postprocess, autocast, dtype, constants)
        self.ref = ready(model)
        self.batch_size = batch_size if isinstance(batch_size, str) else int(batch_size)
        self.training = training
        self.device = device
        self.engine = engine
        self.sort_by = sort_by
        self.keywords = tuple(keywords)
        self.job: Job | None = None
        self.binding: Binding | None = None
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
        return self._digest(self.batch_size, self.binding.casts if self.binding is not None else None)

    def _digest(self, batch_size: int | str | None = None, casts: tuple[str, ...] | None = None) -> str:
        canonical = Canonical()
        settings = (vars(self.call), self.training, self.device, self.sort_by, self.keywords)
        # Without a word of the one that all jobs had before there was a choice: theirs can go on.
        engine = () if self.engine == "eager" else (self.engine,)
        canonical.add((self.ref.digest, batch_size, settings, casts, *engine))
        return canonical.hexdigest()

    def _settings(self) -> tuple[Hashable, ...]:
        """What a binding depends on beside the inputs; functions and constants may change, and are looked at anew."""
        if not self.call.is_fixed:
            return (self._digest(), self.keywords)
        told = (self.training, self.device, self.sort_by, self.keywords, self.engine)
        return (self.ref.digest, self.call.method, self.call.output, self.call.autocast, self.call.dtype, *told)

    def _with(self, **changed: Any) -> Predictor:
        """A copy with other attributes; `copy.copy` takes longer than a small request has."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), **changed)
        return other

    def bind(self, inputs: Sequence[Rows], sample: Callable[[], Sequence[Array]] | None = None) -> Predictor:
        """The predictor for inputs of these row shapes and dtypes, with its outputs' shapes and dtypes found.

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
        key = (*self._settings(), *inputs)
        with _lock:
            binding = _found.get(key)
        if binding is None:
            if self.sort_by is not None:
                mask_of(inputs, self.keywords, self.sort_by)
            binding = find_binding(self.ref, self.call, self.training, inputs, self.keywords, sample)
        with _lock:
            _found[key] = binding
            _found.move_to_end(key)
            while len(_found) > _FOUND_MOST:
                _found.popitem(last=False)
        return self._with(binding=binding)

    @property
    def counted_as(self) -> Job:
        """The job that its blocks are counted for; calls that are part of none are one."""
        return self.job or Job(f"call-{self.ref.digest[:12]}", str(self.ref))

    def of_job(self, key: str) -> Predictor:
        """The predictor whose blocks are counted for the job of that key."""
        return self._with(job=Job(key, self.counted_as.name))

    @property
    def outputs(self) -> tuple[Rows, ...]:
        """What goes out. For a bound predictor."""
        return self._bound().outputs

    @property
    def several(self) -> bool:
        """Whether it goes out as a tuple. For a bound predictor."""
        return self._bound().several

    def _bound(self) -> Binding:
        assert self.binding is not None
        return self.binding

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
        bound = self.bind([rows_of(a) for a in arrays], lambda: [first_rows(a) for a in arrays])
        binding = bound._bound()
        shape, ndim = binding.output.shape, arrays[0].ndim
        return {
            "dtype": binding.output.dtype,
            "meta": np.empty((0,) * (1 + len(shape)), binding.output.dtype),
            "chunks": (arrays[0].chunks[0], *((n,) for n in shape)),
            "drop_axis": list(range(1, ndim)),
            "new_axis": list(range(1, 1 + len(shape))),
            "binding": binding,
            "rows": bound.planned(arrays[0].chunks[0]),
        }

    def __call__(
        self,
        *blocks: Array,
        binding: Binding | None = None,
        rows: int | None = None,
        block_id: tuple[int, ...] | None = None,
        **inputs: Array,
    ) -> Any:
        """Run the model on blocks of rows.

        Parameters
        ----------
        *blocks, **inputs : numpy.ndarray
            ``(rows, ...)`` each, with equal numbers of rows.
        binding : Binding, optional
            From `like`. Default: found at the first call for rows of a kind, and remembered.
        rows : int, optional
            Rows of a batch, from `like`.
        block_id : tuple of int, optional
            Given by ``map_blocks``.

        Returns
        -------
        numpy.ndarray, or a tuple of them
            ``(rows, ...)``; bfloat16 comes back as float32, which NumPy has.

        Raises
        ------
        InputError, BlockError
        """
        predictor = self._with(keywords=tuple(inputs) or self.keywords, binding=binding or self.binding)
        if block_id is None:
            return predictor.run_block((*blocks, *inputs.values()), "the rows given", 0, rows)
        return predictor.run_block((*blocks, *inputs.values()), f"block {block_id[0]}", None, rows)

    def planned(self, lengths: Sequence[float]) -> Any:
        """Rows of a batch, for blocks of these lengths: a number, or a lazy one where it is to be measured.

        All blocks of a graph get the same, whichever worker measures it. For a bound predictor.
        """
        usual = self._rule_of_thumb()
        if not self._is_worth_measuring(sum(lengths), usual):
            return usual
        from dask import delayed

        return delayed(self.measured, pure=True)(dask_key_name="batch-size-" + self.fingerprint())

    def _rule_of_thumb(self) -> int:
        if isinstance(self.batch_size, int):
            return self.batch_size
        rows = max(1, _AUTO_BYTES // max(1, sum(r.nbytes for r in self._bound().prepared)))
        return min(_AUTO_MOST, max(_AUTO_LEAST, 1 << (rows.bit_length() - 1)))

    def _is_worth_measuring(self, rows: float, usual: int) -> bool:
        """Whether there are so many rows (nan: who knows how many) that a better batch size pays for its finding."""
        return self.batch_size == "auto" and not rows < _WORTH_MEASURING * usual

    def measured(self) -> int:
        """Rows of a batch, measured in this process unless it is known. For a bound predictor."""
        device = self.device_here()
        place = self.place(device)
        found = place.known()
        if found is None:
            binding = self._bound()

            def made(rows: int) -> list[torch.Tensor]:
                zeros = [np.zeros((rows, *r.shape), r.dtype) for r in binding.prepared]
                return [to_tensor(a, c, device) for a, c in zip(zeros, binding.casts, strict=True)]

            if pipeline.suits(device):  # where copies are made while it computes
                made = lru_cache(maxsize=1)(made)
            with residents.lend(self.ref, str(device), self.training) as model, torch.inference_mode():

                def run(rows: int) -> None:
                    with computing():
                        self.call.on(model)(made(rows), binding.names)

                try:
                    found = measure(run, device)
                except Exception as error:
                    # Zeros are not for every model: lengths of nothing, indices into nothing.
                    if not is_out_of_memory(error):
                        log.info("the batch size of %s is not measured: %s", self.ref, explain(error))
                    found = Size(self._rule_of_thumb())
            found = place.remember(found)
            log.info("%s: batches of %d rows on %s", self.ref, found.rows, device_name(device))
        rows = found.rows
        # Remembered from a day with more memory, perhaps.
        while rows > 1 and rows * found.row_bytes > memory_budget(device):
            rows //= 2
        return rows

    def place(self, device: torch.device) -> Place:
        """Where the batch size that was measured on a device is remembered. For a bound predictor."""
        binding, call = self._bound(), self.call
        inputs = (binding.prepared, binding.casts, binding.names)
        return _place(
            self.ref,
            self.ref.store,
            device_name(device),
            jobs_here(),
            inputs,
            call.method,
            call.autocast,
            tuple(sorted(call.constants)),
        )

    def device_here(self) -> torch.device:
        """The device that blocks are computed on in this process."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def run_block(
        self,
        blocks: Sequence[Array],
        where: str,
        first_row: int | None = 0,
        batch_rows: int | None = None,
        numbers: Array | None = None,
    ) -> Any:
        """Run the model on one block.

        Parameters
        ----------
        blocks : sequence of numpy.ndarray
            Positional inputs first, then those of ``keywords``.
        where : str
            What to call the block in errors.
        first_row : int, optional
            Number of the block's first row in the whole array; None: not known.
        batch_rows : int, optional
            Rows of a batch, from `planned`. Default: found here.
        numbers : numpy.ndarray, optional
            Which rows of the block these are, where they are some of it.

        Returns
        -------
        numpy.ndarray, or a tuple of them
        """
        names = self.keywords
        blocks = [as_block(block, input_name(number, len(blocks), names)) for number, block in enumerate(blocks)]
        found = tuple(rows_of(block) for block in blocks)
        lengths = sorted({len(block) for block in blocks})
        if len(lengths) > 1:
            raise InputError(f"{where}: the inputs have different numbers of rows, {lengths}")
        bound = self if self.binding and self.binding.inputs == found else self.bind(found, lambda: blocks)
        binding = bound._bound()
        results = [np.empty((lengths[0], *rows.shape), rows.dtype) for rows in binding.outputs]
        if lengths[0] > 0:
            if batch_rows is None:
                batch_rows = bound._batch_rows(lengths[0])
            with self.counted(blocks, where, sum(result.nbytes for result in results)) as clock:
                BlockRun(bound, blocks, Span(self.ref, where, first_row, numbers), clock).fill(results, batch_rows)
        return tuple(results) if binding.several else results[0]

    def counted(self, blocks: Sequence[Array], where: str, nbytes: int = 0) -> AbstractContextManager[Clock]:
        """Context in which a block is computed, of which ``nbytes`` come out; yields its clock."""
        return telemetry.block(
            self.counted_as, str(self.ref), where, len(blocks[0]), sum(b.nbytes for b in blocks), nbytes
        )

    def _batch_rows(self, rows: int) -> int:
        usual = self._rule_of_thumb()
        return self.measured() if self._is_worth_measuring(rows, usual) else usual


@lru_cache(maxsize=_FOUND_MOST)
def _place(
    ref: ModelRef,
    store: str,  # which refs that are equal may differ in
    device: str,
    jobs: int,
    inputs: tuple[Any, ...],
    method: str,
    autocast: str | None,
    constants: tuple[str, ...],
) -> Place:
    return Place.of(ref, device, jobs, *inputs, (method, autocast, [*constants]))
