"""What a predictor finds out about its inputs before any work: casts, and the shapes and dtypes of its outputs.

A model is run without weights (`probing`), and on two real rows only where its branches depend on data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .calling import Call
from .catalog import describe
from .errors import InputError, OutputError, ZcinferError
from .loading import residents
from .outputs import OutputFunctionError, rows_axis
from .probing import explain, furthest, weightless
from .rows import Array, Rows, candidate_casts, rows_of, to_tensor, two_rows, zeros
from .store import ModelRef

log = logging.getLogger("zcinfer")

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Binding:
    """What was found for given inputs.

    Attributes
    ----------
    inputs : tuple of Rows
        As they come.
    keywords : tuple of str
        Names of the last of them.
    prepared : tuple of Rows
        As the model gets them, but for their dtypes.
    names : tuple of str
        Of the last of these.
    casts : tuple of str
        torch's name of the dtype that each of these is cast to.
    raw : tuple of Rows
        The chosen outputs, as the model gives them.
    outputs : tuple of Rows
        As they go out.
    several : bool
        Whether they go out as a tuple.
    """

    inputs: tuple[Rows, ...]
    keywords: tuple[str, ...]
    prepared: tuple[Rows, ...]
    names: tuple[str, ...]
    casts: tuple[str, ...]
    raw: tuple[Rows, ...]
    outputs: tuple[Rows, ...]
    several: bool

    @property
    def output(self) -> Rows:
        """The only output."""
        if self.several:
            raise OutputError(
                f"there are {len(self.outputs)} outputs: use zcinfer.predict, which gives an array for each"
            )
        return self.outputs[0]


def find_binding(
    ref: ModelRef,
    call: Call,
    training: str,
    inputs: Sequence[Rows],
    keywords: tuple[str, ...],
    sample: Callable[[], Sequence[Array]] | None,
) -> Binding:
    """Find what the model takes of such inputs, and gives.

    Parameters
    ----------
    inputs : sequence of Rows
        Positional ones first, then those of ``keywords``.
    sample : callable, optional
        Gives some real rows of each input; asked for only where zeros do not serve.

    Raises
    ------
    InputError
        The model refuses such rows.
    OutputError
        Its output has no rows, or several outputs and none was chosen.
    """
    for number, rows in enumerate(inputs):
        if rows.dtype.kind not in "biufc" and call.preprocess is None:
            raise InputError(
                f"{input_name(number, len(inputs), keywords)} has dtype {rows.dtype}, which is not numeric: convert it "
                "first, for example with .astype('float32')"
            )
    description, skeleton = describe(ref)
    samples: list[Sequence[Array]] = []

    def two() -> list[Array]:
        if not samples:
            samples.append(sample() if sample else zeros(inputs))
        return [two_rows(r, array) for r, array in zip(inputs, samples[0], strict=True)]

    two_prepared, names = _prepared(call, inputs, keywords, two)
    prepared = tuple(map(rows_of, two_prepared))
    failures: list[Exception] = []
    candidates = list(candidate_casts(prepared, description.dtype))

    def attempt(run: Callable[[tuple[str, ...]], tuple[Rows, ...]]) -> Binding | None:
        for casts in candidates:
            try:
                raw = run(casts)
            except ZcinferError:
                raise
            except Exception as error:
                failures.append(error)
            else:
                outputs, several = _finished(call, raw)
                return Binding(tuple(inputs), keywords, prepared, names, casts, raw, outputs, several)
        return None

    def run_fake(casts: tuple[str, ...]) -> tuple[Rows, ...]:
        shapes = []
        for rows in (2, 3):
            with weightless(skeleton, description) as model:
                if training == "eval":
                    model.eval()
                tensors = [
                    torch.empty((rows, *r.shape), dtype=getattr(torch, cast))
                    for r, cast in zip(prepared, casts, strict=True)
                ]
                shapes.append(_shapes(call.on(model)(tensors, names)))
        return tuple(rows_axis(pair, (2, 3), ref) for pair in zip(*shapes, strict=True))

    def run_real(casts: tuple[str, ...]) -> tuple[Rows, ...]:
        shapes = []
        rows, _ = call.prepare(two(), keywords)
        with residents.lend(ref, "cpu", training) as model, torch.inference_mode():
            for count in (1, 2):
                tensors = [to_tensor(r[:count], c, _CPU) for r, c in zip(rows, casts, strict=True)]
                shapes.append(_shapes(call.on(model)(tensors, names)))
        return tuple(rows_axis(pair, (1, 2), ref) for pair in zip(*shapes, strict=True))

    binding = attempt(run_fake)
    if binding is not None:
        return binding
    binding = attempt(run_real)
    if binding is None:
        found = ", ".join(f"{input_name(n, len(prepared), names)} {rows}" for n, rows in enumerate(prepared))
        failure = furthest(failures[len(failures) // 2 :])  # those on real rows
        if isinstance(failure, OutputFunctionError):
            raise OutputError(f"{ref}: {failure}") from failure
        raise InputError(
            f"{ref} ({description.class_name}) does not take these inputs: found {found}; "
            f"{explain(failure)}. Give rows of the shape and dtype that the model was made for."
        ) from failure
    log.info(
        "the output of %s could not be found without weights (%s); two rows were run on the CPU",
        ref,
        type(failures[0]).__name__,
    )
    return binding


def _prepared(
    call: Call, inputs: Sequence[Rows], keywords: tuple[str, ...], real: Callable[[], list[Array]]
) -> tuple[list[Array], tuple[str, ...]]:
    """Two rows of each input as ``preprocess`` makes them: of zeros, or of real rows where those do not serve."""
    if all(rows.dtype.kind in "biufc" for rows in inputs):  # zero as a text or a time says nothing
        try:
            return call.prepare([two_rows(r, array) for r, array in zip(inputs, zeros(inputs), strict=True)], keywords)
        except ZcinferError:
            raise
        except Exception:
            pass  # preprocess may refuse zeros and take real rows: these decide
    try:
        return call.prepare(real(), keywords)
    except ZcinferError:
        raise
    except Exception as error:
        raise InputError(
            f"preprocess failed on rows of the inputs: {type(error).__name__}: {error}. It gets NumPy rows "
            f"({', '.join(map(str, inputs))})"
        ) from error


def _finished(call: Call, raw: Sequence[Rows]) -> tuple[tuple[Rows, ...], bool]:
    """Outputs as they go out, tried on two rows of zeros."""
    try:
        made = call.finish(zeros(raw))
    except ZcinferError:
        raise
    except Exception as error:
        raise OutputError(
            f"postprocess failed on two rows of zeros ({', '.join(map(str, raw))}): {type(error).__name__}: {error}"
        ) from error
    every = made if isinstance(made, tuple) else (made,)
    for array in every:
        if array.shape[:1] != (2,):
            raise OutputError(f"postprocess made shape {array.shape} of 2 rows: it must give a row for each row")
    return tuple(map(rows_of, every)), isinstance(made, tuple)


def _shapes(outputs: Sequence[torch.Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(int(n) for n in output.shape), output.dtype) for output in outputs]


def input_name(number: int, total: int, keywords: Sequence[str]) -> str:
    """What to call an input in errors."""
    positional = total - len(keywords)
    return f"input {number}" if number < positional else repr(keywords[number - positional])
