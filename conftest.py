"""What tests and the examples in docstrings share: directories of their own, so that nobody's models are touched."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import dask
import pytest

from zcinfer import catalog, loading

# A shell starts what it runs in the background deaf to Ctrl-C, and so would be the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's models, and no child process of a test does."""
    state = tmp_path_factory.mktemp("state")
    names = {"DASK_ZCINFER__REGISTRY": str(state / "registry"), "XDG_STATE_HOME": str(state), "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    with dask.config.set({"zcinfer.registry": names["DASK_ZCINFER__REGISTRY"]}):
        yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _examples_stand_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """An example in a docstring needs no Ray, depends on no other, and leaves nothing behind."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    before = dict(os.environ)  # nannies set variables in the process they live in
    catalog.disconnect()
    with dask.config.set({"zcinfer.store": "file"}):
        yield
    catalog.disconnect()
    loading.residents.clear()
    os.environ.clear()
    os.environ.update(before)
