"""No reader can change what another reader sees; a mapping lives as long as what lies on it, and not longer.

Readers are processes (`readers`), and this process, which has the model loaded all the while. Where a reader may
not look into the raylet, Plasma's own pages are read-only: readers get there by giving up rights.
"""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from mmap import PAGESIZE
from typing import Any

import dask
import pytest
import ray
from readers import Footprint, Model, Outcome, Readers, digest_of

from zcinfer import catalog, publishing
from zcinfer.archive import MARGIN, WEIGHTS
from zcinfer.loading import load_ref
from zcinfer.parts import split
from zcinfer.store import ModelRef, registry_of

FILE, RAY, READ_ONLY = "file", "ray", "ray, read-only"
ON_RAY = [pytest.param(kind, marks=[pytest.mark.ray, pytest.mark.slow]) for kind in (RAY, READ_ONLY)]
EVERYWHERE = [FILE, *ON_RAY]
READ_ONLY_ALONE = ON_RAY[1:]


@dataclass
class Place:
    """Where readers find the model, and with which rights."""

    kind: str
    ref: ModelRef
    readers: Readers
    ray_store: Any = None

    def ask(self, name: str, *arguments: Any) -> Outcome:
        outcome = self.readers.ask(name, *arguments, fewer_rights=self.kind == READ_ONLY)
        if "rights cannot be given up" in outcome.errors:
            pytest.skip("nobody can give up rights here, neither capabilities nor the user namespace")
        protection = "read-only" if self.kind == READ_ONLY else "copy-on-write"
        assert outcome.facts.pop("protection", None) == protection, outcome.errors
        return outcome

    @cached_property
    def model(self) -> Any:
        """The model in this process."""
        return load_ref(self.ref)

    def bytes_in_store(self) -> Any:
        """The model's bytes as they lie in the store, without a mapping of ours."""
        if self.ray_store is not None:
            return ray.get(self.ray_store._ask(self.ref.digest)[1][0])[MARGIN:]
        archive = registry_of(self.ref.store) / "archives" / self.ref.digest
        return (archive / WEIGHTS).read_bytes()[-self.ref.nbytes :]

    def publish(self, model: Model, name: str, **settings: Any) -> ModelRef:
        """Another model, which this process does not load."""
        return replace(publishing.put(model.eval(), name, **settings), store=self.ref.store)


@pytest.fixture(scope="module")
def process() -> Iterator[Readers]:
    process = Readers()
    yield process
    process.close()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRef]:
    """A model in a registry, to be had from the file store."""
    directory = tmp_path_factory.mktemp("safety") / "registry"
    with dask.config.set({"zcinfer.registry": str(directory), "zcinfer.ray.object-store-memory": "80 MB"}):
        catalog.connect("file")
        yield publishing.put(Model().eval(), "model")
        catalog.disconnect()


@pytest.fixture(scope="module")
def ray_store(published: ModelRef) -> Any:
    return catalog.connect("ray")


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest, published: ModelRef, process: Readers) -> Place:
    if request.param == FILE:
        return Place(FILE, published, process)
    store = request.getfixturevalue("ray_store")
    return Place(request.param, replace(published, store=store.url), process, store)


def digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def untouched() -> tuple[str, str]:
    """Digests of the model, and of its bytes as they were published."""
    model = Model().eval()
    return digest_of(model), digest(b"".join(bytes(piece) for piece in split(model).pieces()))


# Where a write to read-only pages is traced to; none: to a small tensor or a buffer, which each process has for itself.
WRITES = {
    "batchnorm_in_train_mode": [],
    "cache_in_a_buffer": [],
    "data_of_a_small_parameter": [],
    "caches_in_one_storage": ["readers.py in caches_in_one_storage"],
    "embedding_with_max_norm": [
        "torch/nn/modules/sparse.py in forward",
        "traces.py in embedding of model@1 (Embedding)",
        "readers.py in forward",
        "traces.py in model@1 (Model)",
    ],
    "data_of_a_parameter": ["readers.py in data_of_a_parameter"],
    "array_over_a_parameter": ["readers.py in array_over_a_parameter"],
    "parameter_in_a_thread_of_torch": ["readers.py in parameter_in_a_thread_of_torch"],
    "state_dict_into_the_model": ["torch/nn/modules/module.py in load", "readers.py in state_dict_into_the_model"],
    "optimiser_step": ["torch/optim/sgd.py in step", "readers.py in train"],
}


def assert_traced(errors: str, places: list[str]) -> None:
    assert "Fatal Python error: Segmentation fault" in errors
    frames = re.findall(r'^  File "(.*)", line \d+ in (.*)$', errors, re.MULTILINE)
    for place in places:
        assert [frame for frame in frames if " in ".join(frame).endswith(f"/{place}")], errors


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
def test_a_write_changes_nothing_for_others(place: Place, name: str, untouched: tuple[str, str]) -> None:
    before = digest_of(place.model)
    outcome = place.ask("write", place.ref, name)
    if place.kind == READ_ONLY and WRITES[name]:
        assert (outcome.status, outcome.facts) == (-signal.SIGSEGV, {})
        assert "model@1 is read-only in this process" in outcome.errors
        assert_traced(outcome.errors, WRITES[name])
    else:
        assert outcome.status == 0, outcome.errors
        assert outcome.facts == {"written": True, "seen_by_the_next": False}
    assert digest(place.bytes_in_store()) == untouched[1]
    assert digest_of(place.model) == before == untouched[0]


@pytest.mark.parametrize("place", READ_ONLY_ALONE, indirect=True)
def test_pages_are_read_only_as_long_as_one_of_several_models_lies_on_them(
    place: Place, untouched: tuple[str, str]
) -> None:
    tuned = Model()
    tuned.scale.data.fill_(3)
    variant = place.publish(tuned, "variant", base="model")
    for name, others in (("write_after_a_twin_is_gone", []), ("write_after_a_variant_is_gone", [variant])):
        outcome = place.ask(name, place.ref, *others)
        assert (outcome.status, outcome.facts) == (-signal.SIGSEGV, {}), name
    assert digest(place.bytes_in_store()) == untouched[1]


@pytest.mark.parametrize("place", READ_ONLY_ALONE, indirect=True)
def test_pages_are_read_only_to_the_end_of_the_process(place: Place, untouched: tuple[str, str]) -> None:
    assert place.ask("write_at_exit", place.ref).status == -signal.SIGSEGV
    assert digest(place.bytes_in_store()) == untouched[1]


@pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
def test_every_block_meets_the_model_as_published(place: Place, untouched: tuple[str, str]) -> None:
    assert set(place.ask("lend", place.ref).facts["blocks"]) == {untouched[0]}


USES = ["gradients", "train_mode", "another_dtype", "half", "training_after_a_cast", "training_of_a_copy", "training"]


@pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
def test_what_was_loaded_does_what_the_original_does(place: Place) -> None:
    # What trains read-only weights in place is among the writes.
    uses = USES[:-1] if place.kind == READ_ONLY else USES
    outcome = place.ask("use", place.ref, uses)
    assert outcome.facts == dict.fromkeys(uses, True), outcome.errors


@pytest.mark.parametrize("place", EVERYWHERE, indirect=True)
def test_a_thousand_models_leave_nothing(place: Place) -> None:
    refs = [place.publish(Model(seed), f"model-{seed}") for seed in range(1, 21)]
    outcome = place.ask("load_and_drop", refs, 1000)
    assert outcome.status == 0, outcome.errors
    before, after = (Footprint(*outcome.facts[when]) for when in ("before", "after"))
    assert (after.mapped, after.protected) == (0, 0)
    # Ray's connections and threads come and go, each thread with a stack and a heap of its own.
    assert after.descriptors <= before.descriptors + 5
    assert after.threads <= before.threads + 5
    assert after.maps <= before.maps + 50
    # Less than a page a model; the records of the last loads are a tenth of that.
    assert after.private < before.private + 1000 * PAGESIZE, (before, after)


@pytest.mark.parametrize("place", ON_RAY, indirect=True)
def test_memory_is_given_to_others_when_the_last_view_is_gone(place: Place) -> None:
    outcome = place.ask("outlive", place.publish(Model(seed=100), "viewed"))
    assert outcome.status == 0, outcome.errors
    assert outcome.facts == {"taken_while_in_use": False, "changed_while_in_use": False, "taken_afterwards": True}


@pytest.mark.parametrize("place", ON_RAY, indirect=True)
def test_what_is_loaded_outlives_a_ray_that_is_left(place: Place) -> None:
    outcome = place.ask("leave", place.publish(Model(seed=200), "left"))
    assert outcome.status == 0, outcome.errors
    freed = outcome.facts.pop("freed")
    assert outcome.facts == {"spares": 0, "changed": False, "writable": True}
    assert freed > 0.9 * place.ref.nbytes
