"""Running a model without weights, to learn what it takes and gives; and saying where in it an error arose.

Not for real rows. Torch's fake tensors check shapes but few dtypes: only an operator's kernel knows which it takes, so
those that get other than floating tensors are tried on zeros as well.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from .description import Description
from .parts import join_fake

# Operators whose tensors must all be floating, all complex or all integers, at any size; masks may be boolean.
_STRICT = frozenset(
    (
        *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "convolution", "_convolution"),
        *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
        *("native_layer_norm", "native_group_norm", "mkldnn_rnn_layer"),
        *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"),
        *("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
    )
)

# Elements of an operator's tensors up to which it is tried on real zeros: milliseconds.
_SMALL = 1 << 22

# What a layer says of its input, by the attribute that says it.
_EXPECTS = (
    "in_features",
    "in_channels",
    "input_size",
    "normalized_shape",
    "num_features",
    "num_embeddings",
    "embed_dim",
)


class _DtypeCheck(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if name in _STRICT:
            masked = "attention" in name or "transformer" in name
            strict = [t.dtype for n, t in enumerate(tensors) if not (masked and n > 0 and t.dtype == torch.bool)]
            if len({(dtype.is_floating_point, dtype.is_complex) for dtype in strict}) > 1:
                raise TypeError(f"{name} of tensors of {' and '.join(sorted({str(dtype) for dtype in strict}))}")
        elif name == "embedding" and tensors[1].dtype not in (torch.int32, torch.int64):
            raise TypeError(f"embedding with indices of {tensors[1].dtype}")
        elif any(not t.is_floating_point() for t in tensors) and sum(t.numel() for t in tensors) <= _SMALL:
            with _disable_current_modes():
                func(*tree_map_only(torch.Tensor, _zeros, args), **tree_map_only(torch.Tensor, _zeros, kwargs))
        return func(*args, **kwargs)


def _zeros(fake: torch.Tensor) -> torch.Tensor:
    extent = sum((size - 1) * stride for size, stride in zip(fake.shape, fake.stride(), strict=True)) + 1
    zeros = torch.zeros(fake.storage_offset() + extent if fake.numel() else 0, dtype=fake.dtype)
    return zeros.as_strided(fake.shape, fake.stride(), fake.storage_offset())


@contextmanager
def weightless(skeleton: bytes, description: Description) -> Iterator[torch.nn.Module]:
    """A throw-away module over fake tensors; tensors made inside are fake too.

    Yields
    ------
    torch.nn.Module
        Fake runs leave fake tensors in caches: it must not be used afterwards.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # prints a traceback for what we handle
    with ExitStack() as stack:
        disabled, logger.disabled = logger.disabled, True
        stack.callback(setattr, logger, "disabled", disabled)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.no_grad())
        model = join_fake(skeleton, description)
        stack.enter_context(_DtypeCheck())  # type: ignore[no-untyped-call]
        yield model


def explain(error: BaseException) -> str:
    """The error in a line, with the layer it arose in and what that layer expects."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    modules = _modules_of(error)
    if not modules:
        return text
    layer = modules[-1]
    name = next((name for name, module in modules[0].named_modules() if module is layer), "")
    expects = [f"{attribute}={getattr(layer, attribute)}" for attribute in _EXPECTS if hasattr(layer, attribute)]
    where = f"{type(layer).__name__} {name!r}" if name else type(layer).__name__
    return f"{where} expects {', '.join(expects[:2])}, {text}" if expects else f"in {where}: {text}"


def furthest(errors: Sequence[Exception]) -> Exception:
    """Of errors of one model, that which arose in the latest layer; the last of several."""

    def depth(error: Exception) -> int:
        modules = _modules_of(error)
        return next((n for n, module in enumerate(modules[0].modules()) if module is modules[-1]), 0) if modules else -1

    return max(reversed(errors), key=depth)


def _modules_of(error: BaseException) -> list[torch.nn.Module]:
    """The modules in whose methods an error arose, outermost first."""
    modules = []
    traceback = error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            modules.append(owner)
        traceback = traceback.tb_next
    return modules
