"""The holder as an actor of a Ray, and what Ray knows of it, of its nodes and of their memory.

Not for what the holder does (`holder`), nor for who reads its objects (`ray_store`).
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.experimental
from ray._private.internal_api import node_stats
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .condition import Size
from .description import Description
from .holder import Holder, are_mapped
from .ray_session import NAMESPACE, node_infos
from .sharing import Plasma

Head = tuple[Description, bytes]  # description and skeleton of a model

HOLDER = "zcinfer-holder"
# Seconds that it may take to look how a store is
LOOKING = 3
# Seconds in which other machines tell what their readers have mapped; a process must start there first
ASKING = 5


def find_holder(ours: bool) -> tuple[Any, int | None, dict[str, tuple[Head, Any]]]:
    """The holder of the Ray that this process is in, made where there is none; its raylet's process; what it offers.

    ``ours``: the Ray is one that we started.
    """
    capacity = min(
        (int(node["Resources"].get("object_store_memory", 0)) for node in ray.nodes() if node["Alive"]), default=0
    )
    holder = (
        ray.remote(Holder)
        .options(
            name=HOLDER,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            # Else Ray keeps a record of every question, for pages that nobody looks at: megabytes an hour in its head
            enable_task_events=False,
            # Ray leaves an actor without GPUs all of them to see; the holder must not open one. Our own Ray hides them
            # itself: an environment of its own would keep the holder from the worker process that is there already.
            runtime_env={} if ours else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
            # Where the archives are, of a cluster whose machines have no directory in common.
            resources={"node:__internal_head__": 0.001} if ours else {},
        )
        .remote(capacity, ray.put, ray.get, ray.experimental.get_object_locations, mapped_elsewhere)
    )
    # Opens the connection to the holder, maps Plasma's arena and finds the raylet's file: 100 ms once a process, so
    # that the first load takes what later ones take.
    (reference,), offers = ray.get(holder.greet.remote())
    page = Plasma(ray.get(reference))
    page.map(0, 1)
    return holder, page.raylet(), {digest: (read_head(head), refs) for digest, (head, refs) in offers.items()}


def mapped_elsewhere(places: Mapping[Any, Sequence[str]]) -> set[Any]:
    """Of objects and the nodes that have them, those that readers of other nodes than this one have mapped.

    For the holder. A task on each of these nodes looks; what is there of a node that does not answer counts as mapped.
    """
    here = ray.get_runtime_context().get_node_id()
    asked: dict[str, list[Any]] = {}
    for reference, found in places.items():
        for node in found:
            if node != here:
                asked.setdefault(node, []).append(reference)
    calls = {}
    for node, references in asked.items():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        calls[_look_there.options(scheduling_strategy=there).remote(references)] = references
    answered, _ = ray.wait(list(calls), num_returns=len(calls), timeout=ASKING) if calls else ([], [])
    mapped: set[Any] = set()
    for call, references in calls.items():
        answer = [True] * len(references)
        if call in answered:
            with contextlib.suppress(ray.exceptions.RayError):  # a node that was lost may still run
                answer = ray.get(call)
        else:
            ray.cancel(call)  # as long as it waits for its machine, what is deleted would stay
        mapped.update(reference for reference, is_mapped in zip(references, answer, strict=True) if is_mapped)
    return mapped


def _mapped_here(references: Sequence[Any]) -> list[bool]:
    return are_mapped(references, ray.get)


# Once: Ray's head keeps each that is made
_look_there = ray.remote(num_cpus=0, max_retries=0, enable_task_events=False)(_mapped_here)


def look(address: str, holder: Any) -> tuple[dict[str, Size], dict[str, Any] | None]:
    """What the raylet of this node tells of its store, and Ray's GCS of the holder.

    Asked by connections of their own, and not as a client of Ray: such a one is ended with a raylet that it asks.
    """
    capacity, told = plasma(address)
    sizes: dict[str, Size] = {
        "capacity": capacity,
        "used": int(told.object_store_bytes_used),
        "spilled": int(told.spilled_bytes_total),
        "fallback": int(told.object_store_bytes_fallback),
    }
    return sizes, ray._private.state.state.actor_table(holder._actor_id.hex())


def plasma(address: str) -> tuple[int, Any]:
    """Capacity of this node's Plasma in bytes, and what its raylet counts of it."""
    here = ray.get_runtime_context().get_node_id()
    found = node_infos(address, LOOKING)
    node = next(node for number, node in found.items() if number.hex() == here)
    stats = node_stats(node.node_manager_address, node.node_manager_port, include_memory_info=False).store_stats
    return int(node.resources_total.get("object_store_memory", 0)), stats


def read_head(head: bytes) -> Head:
    """Description and skeleton, as the holder gives them."""
    description, skeleton = pickle.loads(head)
    _ = description.columns  # made once, and kept with it
    return description, skeleton
