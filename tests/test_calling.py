"""How a model is called: several outputs of one pass, functions before and after it, precision."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import zcinfer as zc
from zcinfer.errors import BlockError, InputError, OutputError, SettingsError
from zcinfer.predictor import Predictor

pytestmark = pytest.mark.usefixtures("registry")


class Many(nn.Module):
    """Gives a dict of outputs, and counts its calls in a file."""

    def __init__(self, counted: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
        self.counted = counted

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.counted and type(x) is torch.Tensor:
            with open(self.counted, "a") as file:
                file.write(f"{len(x)}\n")
        y = self.linear(x)
        return {"scores": y, "best": y.argmax(1), "pairs": torch.stack([y, -y], 2)}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def expected(x: np.ndarray, batch: int = 5) -> dict[str, np.ndarray]:
    with torch.no_grad():
        parts = [Many().eval()(torch.from_numpy(x[i : i + batch])) for i in range(0, len(x), batch)]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def test_several_outputs_come_of_one_pass(tmp_path: Any) -> None:
    counted = tmp_path / "calls"
    zc.put(Many(str(counted)).eval(), "many")
    x = normal(20, 4)
    wanted = ["scores", "best", lambda output, inputs: output["pairs"][:, 0] + inputs[0][:, :2]]
    lazy = zc.predict("many", da.from_array(x, chunks=(10, 4)), output=wanted, batch_size=5)
    assert [(y.shape, y.dtype) for y in lazy] == [((20, 3), "f4"), ((20,), "i8"), ((20, 2), "f4")]
    assert not counted.exists()
    found = dask.compute(*lazy, scheduler="sync")
    assert counted.read_text().split() == ["5"] * 4
    plain = expected(x)
    for y, right in zip(found, [plain["scores"], plain["best"], plain["pairs"][:, 0] + x[:, :2]], strict=True):
        assert np.array_equal(y, right)
    assert np.array_equal(lazy[1].compute(scheduler="sync"), plain["best"])  # one alone
    at_once = zc.predict("many", x, output=["scores", "best"], batch_size=5)
    assert isinstance(at_once, tuple)
    assert all(map(np.array_equal, at_once, (plain["scores"], plain["best"])))
    (alone,) = zc.predict("many", x, output=["scores"], batch_size=5)
    assert np.array_equal(alone, plain["scores"])


def test_several_outputs_of_no_rows() -> None:
    zc.put(Many().eval(), "many")
    for y in zc.predict("many", np.zeros((0, 4), np.float32), output=["scores", "pairs"]):
        assert len(y) == 0


def test_what_takes_one_array_refuses_several(tmp_path: Any) -> None:
    zc.put(Many().eval(), "many")
    x = da.from_array(normal(20, 4), chunks=(10, 4))
    with pytest.raises(OutputError, match=r"2 outputs: use zcinfer\.predict"):
        Predictor("many", output=["scores", "best"]).like(x)
    with pytest.raises(SettingsError, match="run one job for each"):
        zc.run("many", x, tmp_path / "out.zarr", output=["scores", "best"])
    with pytest.raises(SettingsError, match="output is an empty list"):
        zc.predict("many", x, output=[])
    with pytest.raises(OutputError, match=r"no output 'nothing': it gives 'scores' \(2, 3\)"):
        zc.predict("many", x, output=["scores", "nothing"])


def test_functions_before_and_after_the_model() -> None:
    zc.put(nn.Linear(8, 3).eval(), "linear")
    with torch.no_grad():
        model = zc.load("linear")
        text = np.array(["1 2", "3 4", "5 6", "7 8", "9 0"])

        def parse(rows: np.ndarray) -> np.ndarray:
            return np.array([[float(n) for n in row.split()] * 4 for row in rows], np.float32)

        right = torch.cat([model(torch.from_numpy(parse(text[i : i + 2]))) for i in (0, 2, 4)]).numpy()
    with pytest.raises(InputError, match="preprocess failed on rows of the inputs"):
        zc.predict("linear", np.array(["x"]), preprocess=parse)
    lazy = zc.predict(
        "linear",
        da.from_array(text, chunks=5),
        preprocess=parse,
        postprocess=lambda y: (y.argmax(axis=1), y.max(axis=1)),
        batch_size=2,
        dtype="float64",
    )
    assert [(y.shape, y.dtype) for y in lazy] == [((5,), "i8"), ((5,), "f8")]
    best, top = dask.compute(*lazy, scheduler="sync")
    assert np.array_equal(best, right.argmax(axis=1))
    assert np.array_equal(top, right.max(axis=1).astype("f8"))


def test_preprocess_may_name_what_the_model_gets() -> None:
    class Named(nn.Module):
        def forward(self, *, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - 2 * b

    zc.put(Named().eval(), "named")
    x = normal(6, 4)
    found = zc.predict("named", x, preprocess=lambda rows: {"b": rows[:, :2], "a": rows[:, 2:]})
    assert np.array_equal(found, x[:, 2:] - 2 * x[:, :2])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"preprocess": lambda x: x[:1]}, InputError, "made shape .* of 2 rows: it must give a row for each row"),
        ({"preprocess": lambda x: x.tolist()}, InputError, "preprocess gives a list: it must give a NumPy array"),
        ({"postprocess": lambda y: y.sum()}, OutputError, "postprocess gives a float32: it must give a NumPy array"),
        ({"postprocess": lambda y: y[:1]}, OutputError, r"postprocess made shape \(1, 3\) of 2 rows"),
        ({"postprocess": lambda y: 1 / 0}, OutputError, "postprocess failed on two rows of zeros .*ZeroDivisionError"),
        ({"autocast": "float32"}, SettingsError, "autocast is 'float32': choose one of bfloat16, float16"),
        ({"dtype": "int8"}, SettingsError, "dtype is 'int8': floating outputs can become another floating dtype only"),
        ({"dtype": "nonsense"}, SettingsError, "dtype is 'nonsense': name one of NumPy's"),
        (
            {"sort_by": "length"},
            SettingsError,
            "sort_by='length' needs an input by the name 'attention_mask', found none",
        ),
    ],
)
def test_wrong_settings_are_told_before_anything_is_computed(settings: Any, error: type, message: str) -> None:
    zc.put(nn.Linear(4, 3).eval(), "linear")
    with pytest.raises(error, match=message):
        zc.predict("linear", da.zeros((10, 4), chunks=(5, 4), dtype="f4"), **settings)


def test_a_function_that_changes_its_mind_names_the_rows() -> None:
    zc.put(nn.Linear(4, 3).eval(), "linear")
    x = normal(10, 4)
    first = zc.predict("linear", x, batch_size=4)[0, 0]
    with pytest.raises(
        BlockError, match=r"rows 4–7, of linear@1: .*shape \(4, 2\), expected \(4, ...\) as \(rows, 3\)"
    ):
        zc.predict(
            "linear", x, batch_size=4, postprocess=lambda y: y[:, : 3 if (y == y[0]).all() or y[0, 0] == first else 2]
        )


def test_autocast_is_torchs() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    zc.put(model, "mlp")
    x = normal(8, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        right = model(torch.from_numpy(x)).float().numpy()
    lazy = zc.predict("mlp", da.from_array(x, chunks=(8, 16)), autocast="bfloat16")
    assert lazy.dtype == np.float32
    assert np.array_equal(lazy.compute(scheduler="sync"), right)
    assert not np.array_equal(zc.predict("mlp", x), right)
    assert zc.predict("mlp", x, autocast="bfloat16", dtype="float16").dtype == np.float16


def test_outputs_of_a_real_model_by_name() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config).eval()
    zc.put(model, "bert")
    ids = np.random.default_rng(0).integers(0, 50, (6, 10))
    with torch.no_grad():
        right = model(torch.from_numpy(ids))
    hidden, pooled = zc.predict("bert", input_ids=ids, output=["last_hidden_state", "pooler_output"])
    assert np.array_equal(hidden, right.last_hidden_state.numpy())
    assert np.array_equal(pooled, right.pooler_output.numpy())
