"""What a notebook shows: sizes in words, links, how far a job is; and names as text, whatever they are."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from torch import nn

import zcinfer as zc
from zcinfer import progress
from zcinfer.notebook import link
from zcinfer.progress import Progress
from zcinfer.sizes import format_size
from zcinfer.store import ModelRef

pytestmark = pytest.mark.usefixtures("registry")

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def shown() -> Iterator[list[dict[str, Any]]]:
    """What IPython displays, as in a notebook: a shell with a kernel."""
    shell = InteractiveShell.instance()
    before, shell.display_pub = shell.display_pub, CapturingDisplayPublisher()
    shell.add_traits()
    object.__setattr__(shell, "kernel", SimpleNamespace())
    yield shell.display_pub.outputs
    shell.display_pub = before
    InteractiveShell.clear_instance()


def html(thing: Any) -> str:
    """What a notebook shows of it."""
    formats, _ = InteractiveShell.instance().display_formatter.format(thing)
    return str(formats["text/html"])


@pytest.mark.usefixtures("shown")
def test_a_ref_shows_its_size() -> None:
    ref = zc.put(nn.Linear(100, 25).eval(), "bert")
    assert "bert@1" in html(ref)
    assert format_size(ref.nbytes) in html(ref)
    assert ref.nbytes > 10_000
    assert ref.digest[:12] in html(ref)
    assert EVIL not in html(ModelRef(EVIL, 1, EVIL, 1, EVIL))
    assert html(ModelRef(EVIL, 1, "", 1, EVIL)).count("&lt;img src=x onerror=alert(1)&gt;") == 2


@pytest.mark.usefixtures("shown")
def test_the_table_of_models_is_a_frame_that_shows_sizes_in_words() -> None:
    ref = zc.put(nn.Linear(100, 25).eval(), "bert")
    table = zc.models()
    assert format_size(ref.nbytes) in html(table)
    assert "Linear" in html(table)
    assert isinstance(table, pd.DataFrame)
    assert table["nbytes"].tolist() == [ref.nbytes]
    for part in (table.head(1), table[["nbytes"]], table.assign(nbytes=table["nbytes"] / 1e6)):
        assert type(part) is pd.DataFrame
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(table)), table)
    table.loc[0, "name"] = EVIL
    assert EVIL not in html(table)
    assert "&lt;img" in html(table)
    zc.delete("bert")
    assert "<table" in html(zc.models())


@pytest.mark.usefixtures("shown")
def test_a_cluster_shows_its_page_and_models() -> None:
    zc.put(nn.Linear(100, 25).eval(), "bert")
    with zc.LocalCluster(n_workers=0, dashboard=True) as cluster:
        said = html(cluster) if not hasattr(cluster, "_ipython_display_") else cluster._repr_html_()
        assert f'<a href="{cluster.page_link}" target="_blank" rel="noopener">' in said
        assert "0, with 0 threads" in said
        assert "none yet" in said
        assert "LocalCluster" in said.partition("</table>")[2]  # and what Dask's own shows
    assert "page" not in cluster._repr_html_().partition("</table>")[0]


def test_a_job_shows_how_far_it_is(
    shown: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import zarr

    monkeypatch.setattr(progress, "_DRAWN", 0.0)
    torch.manual_seed(0)
    zc.put(nn.Linear(4, 2).eval(), "bert")
    zarr.create_array(tmp_path / "x.zarr", data=np.ones((10, 4), np.float32), chunks=(5, 4))
    zc.run("bert", tmp_path / "x.zarr", tmp_path / "y.zarr")
    said = [output["data"]["text/html"] for output in shown]
    assert len(said) == 4
    assert [output["update"] for output in shown] == [False, True, True, True]
    assert "bert@1: 0 %, 0 of 10 rows" in said[0]
    assert 'value="0.5000"' in said[1]
    assert "bert@1: 50 %, 5 of 10 rows, " in said[1]
    assert "bert@1: 100 %, 10 of 10 rows, done in " in said[3]
    assert capsys.readouterr().err == ""


def test_a_job_that_stops_says_so_and_names_are_text(shown: list[dict[str, Any]]) -> None:
    with pytest.raises(KeyboardInterrupt), Progress(EVIL, 0):
        raise KeyboardInterrupt
    said = shown[-1]["data"]["text/html"]
    assert "stopped in 0.0 s" in said
    assert "<img" not in said


def test_only_links_are_links() -> None:
    assert "<a" not in link("javascript:alert(1)")
    assert link('http://"><img>') == (
        '<a href="http://&quot;&gt;&lt;img&gt;" target="_blank" rel="noopener">http://&quot;&gt;&lt;img&gt;</a>'
    )
