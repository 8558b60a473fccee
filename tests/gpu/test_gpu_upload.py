"""On a card: what was uploaded in one stream is what ``.to("cuda")`` makes, at the bus's speed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from test_upload import Odd, assert_alike, fetch, joined
from torch import nn

from zcinfer import loading, upload
from zcinfer.publishing import put

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]


@pytest.fixture(autouse=True)
def _never_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed upload is mended by ``.to``; here it fails the test."""

    def told(message: str, *values: Any) -> None:
        pytest.fail(message % values)

    monkeypatch.setattr(upload.log, "warning", told)


@pytest.mark.parametrize("model", [Odd(), nn.Linear(3, 2), nn.Conv2d(3, 8, 3)], ids=lambda model: type(model).__name__)
def test_tensors_are_those_of_to(model: nn.Module, registry: Path) -> None:
    ref = put(model.eval(), "model")
    ours = loading.load_ref(ref, "cuda")
    assert all(tensor.is_cuda for tensor in ours.state_dict().values())
    assert_alike(ours, joined(fetch(ref)))


def test_weights_of_an_lstm_are_packed_as_to_packs_them(registry: Path) -> None:
    model = nn.LSTM(8, 8, 2).eval()
    ours = loading.load_ref(put(model, "model"), "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # cuDNN's, of weights that are not one piece
        found, _ = ours(torch.ones(3, 1, 8, device="cuda"))
    torch.testing.assert_close(found.cpu(), model(torch.ones(3, 1, 8))[0], rtol=1e-4, atol=1e-4)


def test_outputs_are_those_of_to_within_tolerance(registry: Path) -> None:
    # Another alignment of a weight may give it another algorithm of cublasLt
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.GRU(256, 64)).eval()
    ours = loading.load_ref(put(model, "model"), "cuda")
    x = torch.randn(4, 16, 256, device="cuda")
    with torch.inference_mode():
        found, expected = ours(x)[0], model.cuda()(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_each_storage_is_its_own(registry: Path) -> None:
    ours = loading.load_ref(put(nn.Linear(64, 64).eval(), "model"), "cuda")
    weight, bias = ours.parameters()
    assert weight.untyped_storage().nbytes() == 64 * 64 * 4
    assert weight.untyped_storage().data_ptr() != bias.untyped_storage().data_ptr()
    assert weight.data_ptr() % 256 == 0


def test_as_fast_as_a_pinned_copy_and_five_times_a_pageable_one(registry: Path) -> None:
    """The bar of 440 MB in 200 tensors; read ``-rP`` for the figures."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(1024, 1049) for _ in range(100)).eval()
    ref = put(model, "model")
    fetched = fetch(ref)
    nbytes = sum(p.nbytes for p in model.parameters())
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    upload.to_device(joined(fetched), fetched, torch.device("cuda"))  # the slots, once a process
    took: dict[str, list[float]] = {"pinned copy": [], "upload": [], "pageable": []}
    for _ in range(7):
        host, plain = joined(fetched), joined(fetched)
        ways: dict[str, Callable[[], Any]] = {
            "pinned copy": lambda: target.copy_(pinned, non_blocking=True),
            "upload": lambda host=host: upload.to_device(host, fetched, torch.device("cuda")),
            "pageable": lambda plain=plain: plain.cuda(),
        }
        for name, way in ways.items():
            torch.cuda.synchronize()
            begin = perf_counter()
            kept = way()
            torch.cuda.synchronize()
            took[name].append(perf_counter() - begin)
            del kept
    figures = {name: median(seconds) for name, seconds in took.items()}
    for name, seconds in figures.items():
        print(f"{name}: {seconds * 1e3:.2f} ms, {nbytes / seconds / 1e9:.1f} GB/s")
    assert figures["upload"] <= 1.3 * figures["pinned copy"]
    assert figures["upload"] <= figures["pageable"] / 5
