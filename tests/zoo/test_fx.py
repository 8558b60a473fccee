"""Graphs: traced modules with and without parameters of their own, edited, nested."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, make_fx

from zcinfer.errors import SplitError
from zcinfer.parts import split
from zoo.compare import gradients, outputs, round_trip, state_of
from zoo.samples import IMAGE, Models, X, convolution, mlp

OFFSET = 3.0


@fx.wrap
def shifted(x: torch.Tensor) -> torch.Tensor:
    return x + OFFSET if x.sum() > 0 else x - OFFSET


class Rooted(nn.Module):
    """Parameters, buffers and tensors of the root itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("scale", torch.rand(4))
        self.register_buffer("lost", torch.rand(4), persistent=False)
        self.layer = nn.Linear(4, 4)
        self.layer.weight = self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x @ self.weight) * self.scale + self.lost + torch.ones(4)


class Constants(nn.Module):
    """Tensors that are made and changed before an input is met."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("scale", torch.rand(4))
        self.plain = torch.rand(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.weight * 2) + (self.scale + 1) * torch.ones(4) - self.plain.sqrt()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, more: bool = True) -> Any:
        y = self.left(x)
        return {"sum": y + self.right(x) if more else y, "pair": (y, self.right(x)[0])}


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return shifted(self.layer(x))


def edited() -> nn.Module:
    graph = fx.symbolic_trace(mlp())
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target == "1":
            with graph.graph.inserting_after(node):
                new = graph.graph.call_function(torch.tanh, (node.args[0],))
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def by_hand(tracer: Any = fx.Tracer) -> nn.Module:
    graph = fx.Graph(tracer_cls=tracer)
    x = graph.placeholder("x")
    product = graph.call_function(operator.matmul, (x, graph.get_attr("weights.first")))
    graph.output((product, graph.call_method("sum", (product,), {"dim": 1})))
    root = nn.Module()
    root.weights = nn.ParameterDict({"first": torch.randn(4, 3), "unused": torch.randn(2)})
    return fx.GraphModule(root, graph, "ByHand")


def with_attributes() -> nn.Module:
    graph = fx.symbolic_trace(mlp())
    graph.note = "an attribute"
    graph.table = {"weight": graph.get_parameter("0.weight")}
    graph.register_buffer("unused", torch.ones(2))
    return graph


def specialised() -> nn.Module:
    return fx.symbolic_trace(Branches(), concrete_args={"more": True})


class Model(nn.Module):
    """A graph within a module, and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.symbolic_trace(Rooted())
        self.graphs = nn.ModuleList([self.graph, fx.symbolic_trace(mlp())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.graphs[1](self.graphs[0](x))


def of_operators() -> nn.Module:
    graph = make_fx(Constants())(X)
    for node in graph.graph.nodes:
        node.meta.clear()  # fake tensors; torch's pickles leave out what nodes were traced with
    return graph


MODELS: Models = {
    "a graph": (lambda: fx.symbolic_trace(mlp()), (X,)),
    "a graph with weights of its own": (lambda: fx.symbolic_trace(Rooted()), (X,)),
    "a graph with a function left whole": (lambda: fx.symbolic_trace(Whole()), (X,)),
    "a specialised graph": (specialised, (X, True)),
    "an edited graph": (edited, (X,)),
    "a graph by hand": (by_hand, (X,)),
    "a graph with attributes": (with_attributes, (X,)),
    "a graph in eval mode": (lambda: fx.symbolic_trace(convolution().eval()), (IMAGE,)),
    "a graph of operators": (of_operators, (X,)),
    "graphs within a module": (Model, (X,)),
}


def test_weights_of_the_root_are_parameters_and_buffers_of_the_copy() -> None:
    copy = round_trip(fx.symbolic_trace(Rooted()))
    assert [name for name, _ in copy.named_parameters(remove_duplicate=False)] == [
        "weight", "layer.weight", "layer.bias"
    ]  # fmt: skip
    assert copy.weight is copy.layer.weight
    assert {name for name, _ in copy.named_buffers()} >= {"scale", "lost"}


def test_the_graph_of_the_copy_can_be_edited() -> None:
    model = fx.symbolic_trace(Rooted())
    before, expected = state_of(model), outputs(model, (X,)).found
    copy = round_trip(model)
    (last,) = [node for node in copy.graph.nodes if node.op == "output"]
    with copy.graph.inserting_before(last):
        last.args = (copy.graph.call_function(torch.neg, (last.args[0],)),)
    copy.recompile()
    assert torch.equal(copy(X), -model(X))
    assert state_of(model) == before
    assert outputs(model, (X,)).found == expected


def test_what_a_graph_says_of_its_arguments_in_words_is_refused_with_its_place() -> None:
    """Torch cannot pickle a graph whose arguments are annotated with text, as under `import annotations`."""
    graph = fx.symbolic_trace(mlp())
    next(iter(graph.graph.nodes)).type = "torch.Tensor"
    graph.recompile()
    with pytest.raises(SplitError, match="cannot be taken apart: 'str' object has no attribute"):
        split(graph)


def test_hooks_of_a_graph_come_back_or_are_refused() -> None:
    graph = fx.symbolic_trace(mlp())
    graph.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(round_trip(graph)(X), graph(X))


def test_buffers_of_a_graph_that_are_not_saved_stay_so() -> None:
    graph = fx.symbolic_trace(mlp())
    graph.register_buffer("table", torch.ones(2), persistent=False)
    assert list(round_trip(graph).state_dict()) == list(graph.state_dict())


def test_the_metadata_of_a_graph_come_back() -> None:
    graph = fx.symbolic_trace(mlp())
    graph.meta["note"] = {"version": 3}
    assert round_trip(graph).meta == graph.meta


@pytest.mark.parametrize("traced", [lambda: mlp().eval(), Constants], ids=["weights", "constants"])
def test_what_a_graph_does_with_weights_is_not_computed_when_it_is_loaded(traced: Callable[[], nn.Module]) -> None:
    graph = make_fx(traced())(X)
    copy = round_trip(graph)
    assert list(copy.state_dict()) == list(graph.state_dict())
    assert gradients(copy, (X,)) == gradients(graph, (X,)) != {}
    assert split(copy).description.digest == split(graph).description.digest


def test_what_is_computed_all_the_same_is_no_part_of_the_state() -> None:
    """Torch asks for a weight once, however often a graph does: here the names of nodes do not fit."""
    graph = fx.Graph(tracer_cls=PythonKeyTracer)
    x = graph.placeholder("x")
    first, second = graph.get_attr("weight"), graph.get_attr("weight")
    product = graph.call_function(operator.mul, (graph.call_function(torch.neg, (first,)), second))
    graph.output(graph.call_function(torch.matmul, (x, product)))
    root = nn.Module()
    root.weight = nn.Parameter(torch.randn(4, 4))
    module = fx.GraphModule(root, graph)
    copy = round_trip(module)
    assert torch.equal(copy(X), module(X))
    assert list(copy.state_dict()) == ["weight"]


def test_a_graph_by_hand_that_was_loaded_is_the_same_model() -> None:
    graph = by_hand(None)
    copy = round_trip(graph)
    assert outputs(copy, (X,)).found == outputs(graph, (X,)).found
    assert split(copy).description.digest == split(graph).description.digest
