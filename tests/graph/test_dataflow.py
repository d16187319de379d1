"""Recording: what is written down, and that the model is left as it was."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.graph.dataflow import ADDS, Dataflow, call, evaluating, record
from models import (
    ControlFlow,
    Conv1dNet,
    EmbeddingNet,
    Encoder,
    Heads,
    Mlp,
    ResidualCnn,
    TiedLm,
    image,
    with_statistics,
)


def names(flow: Dataflow) -> list[str]:
    return [node.name for node in flow.nodes]


def output_names(flow: Dataflow) -> list[str]:
    return [flow.nodes[index].name for index in flow.outputs]


MODELS: dict[str, tuple[Any, Any]] = {
    "residual cnn": (ResidualCnn, image),
    "mlp": (Mlp, lambda: torch.randn(3, 16)),
    "conv1d": (Conv1dNet, lambda: torch.randn(2, 2, 9)),
    "embedding": (EmbeddingNet, lambda: torch.randint(0, 20, (2, 6))),
    "encoder": (Encoder, lambda: torch.randn(2, 5, 16)),
    "torch encoder layer": (
        lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        lambda: torch.randn(2, 5, 16),
    ),
    "control flow": (ControlFlow, lambda: torch.randn(2, 8)),
    "tied": (TiedLm, lambda: torch.randint(0, 20, (2, 6))),
    "heads": (lambda: Heads("dict"), lambda: torch.randn(2, 8)),
    "lstm": (lambda: nn.Sequential(nn.LSTM(8, 8), nn.Identity()), lambda: torch.randn(3, 2, 8)),
}


@pytest.fixture(params=MODELS)
def model_and_example(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    make, example = MODELS[request.param]
    return with_statistics(make()), example()


# --- the record ------------------------------------------------------------------------------------------


def test_calls_are_recorded_in_order_with_edges_by_tensor_identity():
    flow = record(Mlp(), torch.zeros(1, 16))
    assert names(flow) == ["input", "0", "1", "2", "3", "4"]
    assert [node.inputs for node in flow.nodes] == [(), (0,), (1,), (2,), (3,), (4,)]
    assert [node.users for node in flow.nodes] == [[1], [2], [3], [4], [5], []]
    assert [node.kind for node in flow.nodes] == ["input"] + ["module"] * 5
    assert flow.outputs == (5,)
    assert [node.index for node in flow.nodes] == list(range(6))


def test_functions_are_recorded_with_their_owner_and_modules_hide_their_inside():
    flow = record(ResidualCnn(), image())
    blocks = [node for node in flow.nodes if node.owner == "layers.0"]
    assert [node.name for node in blocks if node.kind == "function"] == ["relu", "add", "relu"]
    assert [node.name for node in blocks if node.kind == "module"] == [
        f"layers.0.{n}" for n in ("conv1", "bn1", "conv2", "bn2")
    ]
    assert "batch_norm" not in names(flow)
    assert "conv2d" not in names(flow)


def test_a_residual_add_has_both_branches_as_inputs_with_their_shapes():
    flow = record(ResidualCnn(), image())
    adds = [node for node in flow.nodes if node.name in ADDS]
    sources = [tuple(flow.nodes[i].name for i in node.inputs) for node in adds]
    assert sources == [
        ("relu", "layers.0.bn2"),
        ("layers.1.down.1", "layers.1.bn2"),
        ("layers.2.bn2", "relu"),
    ]
    assert [node.shapes for node in adds] == [((2, 4, 8, 8),) * 2, ((2, 8, 4, 4),) * 2, ((2, 8, 4, 4),) * 2]
    assert [(node.owner, node.ordinal) for node in adds] == [("layers.0", 0), ("layers.1", 0), ("layers.2", 0)]


def test_adds_are_numbered_per_call_of_their_owner():
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.add(x, self.inner(x))
            y = y.add(x)
            y += x
            y.add_(x)
            return y + 1

    flow = record(nn.Sequential(Owner(), Owner()), torch.randn(2, 4))
    adds = [(node.owner, node.name, node.ordinal) for node in flow.nodes if node.ordinal >= 0]
    expected = [("add", 0), ("add", 1), ("add_", 2), ("add_", 3), ("add", 4)]
    assert adds == [(owner, *pair) for owner in "01" for pair in expected]


def test_a_module_that_changes_its_input_in_place_becomes_the_producer():
    flow = record(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), torch.zeros(1, 4))
    assert [node.inputs for node in flow.nodes] == [(), (0,), (1,), (2,)]


def test_all_calls_of_a_module_are_found():
    model = ControlFlow()
    flow = record(model, torch.ones(1, 8))
    assert [node.name for node in flow.calls("positive")] == ["positive"] * 2
    assert flow.calls("negative") == []
    assert [node.name for node in record(model, -torch.ones(1, 8)).calls("negative")] == ["negative"] * 2


def test_a_module_with_two_names_is_one_node_under_the_first():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.again = self.fc

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.fc(x))

    assert names(record(Net(), torch.zeros(1, 4))) == ["input", "fc", "fc"]


def test_parameters_that_a_function_reads_are_named():
    flow = record(TiedLm(functional=True), torch.randint(0, 20, (2, 6)))
    assert flow.nodes[-1].name == "linear"
    assert flow.nodes[-1].reads == ("embedding.weight",)
    assert all(node.reads == () for node in flow.nodes[:-1])


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass", "slots"])
def test_outputs_are_found_in_containers(kind):
    assert output_names(record(Heads(kind), torch.zeros(1, 8))) == ["left", "right"]


@pytest.mark.parametrize(
    "example",
    [
        torch.ones(2, 4),
        (torch.ones(2, 4),),
        [torch.ones(2, 4), torch.ones(2, 4)],
        {"x": torch.ones(2, 4), "skip": torch.ones(2, 4)},
    ],
)
def test_examples_may_be_a_tensor_positional_or_keyword_arguments(example):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            return self.fc(x) if skip is None else self.fc(x) + skip

    model = Net()
    tensors = 1 if isinstance(example, (Tensor, tuple)) else 2
    flow = record(model, example)
    assert names(flow).count("input") == tensors
    assert names(flow)[tensors:] == ["fc"] + ["add"] * (tensors - 1)
    assert call(model, example).shape == (2, 4)


def test_functions_that_return_no_tensor_leave_no_node():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[0] == x.size(0) == len(x)
            return self.fc(x).relu() if x.is_floating_point() and x.dim() else x

    assert names(record(Net(), torch.zeros(2, 2))) == ["input", "fc", "relu"]


# --- what recording leaves behind ---------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    hooks = {
        name: [
            dict(m._forward_hooks),
            dict(m._forward_pre_hooks),
            dict(m._forward_hooks_with_kwargs),
            dict(m._backward_hooks),
        ]
        for name, m in model.named_modules()
    }
    return {
        "hooks": hooks,
        "modes": {name: m.training for name, m in model.named_modules()},
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "classes": {name: type(m) for name, m in model.named_modules()},
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("hooks", "modes", "classes"):
        assert before[key] == after[key], key
    assert all(before["gradients"][name] is after["gradients"][name] for name in before["gradients"])
    assert torch.equal(before["random"], after["random"])
    assert before["state"].keys() == after["state"].keys()
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]), name


def test_recording_leaves_hooks_modes_statistics_gradients_and_random_state_alone(model_and_example):
    model, example = model_and_example
    model.train()
    next(iter(model.children())).eval()  # modes may be mixed
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    before = snapshot(model)
    record(model, example)
    assert_same(before, snapshot(model))
    assert seen == [1], "the user's own hook runs once, like in any forward"
    assert torch.is_grad_enabled()


def test_a_forward_that_raises_leaves_the_model_alone_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(5, 4)).train()
    example = torch.randn(2, 4)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        record(model, example)
    assert_same(before, snapshot(model))
    assert torch.is_grad_enabled()
    assert names(record(model[:2], example)) == ["input", "0", "1"]


def test_recording_computes_what_evaluation_computes(model_and_example):
    model, example = model_and_example
    outputs: list[Any] = []
    model.register_forward_hook(lambda m, args, out: outputs.append(out))
    record(model.train(), example)
    with torch.no_grad(), evaluating(model):
        call(model, example)
    pairs = zip(*(torch.utils._pytree.tree_leaves(out) for out in outputs), strict=True)
    # torch's own encoder layer has a fused path in eval mode, which adds up in another order
    same = torch.allclose if isinstance(model, nn.TransformerEncoderLayer) else torch.equal
    assert all(same(a, b) for a, b in pairs)


# Control flow that depends on numbers needs numbers.
@pytest.mark.parametrize("model_and_example", [name for name in MODELS if name != "control flow"], indirect=True)
def test_recording_works_without_numbers_on_the_meta_device(model_and_example):
    model, example = model_and_example
    here = record(model, example)
    there = record(copy.deepcopy(model).to("meta"), example.to("meta"))
    assert names(there) == names(here)
    assert [node.inputs for node in there.nodes] == [node.inputs for node in here.nodes]
    assert there.outputs == here.outputs


def test_recording_keeps_no_activation_alive():
    alive_at_the_end: list[bool] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.first(x))
            ghosts = [weakref.ref(h)]
            h = self.second(h)
            ghosts.append(weakref.ref(h))
            h = h * 2
            alive_at_the_end.extend(ghost() is not None for ghost in ghosts)
            return h

    results: list[weakref.ref] = []
    model = Net()
    model.register_forward_hook(lambda m, args, out: results.append(weakref.ref(out)))
    flow = record(model, torch.zeros(1, 4))
    gc.collect()
    assert alive_at_the_end == [False, False]
    assert results[0]() is None
    assert len(flow.nodes) == 5


def test_a_tensor_that_reuses_freed_memory_is_not_mistaken_for_the_old_one():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Identity()  # a module without children is a leaf, whose calls are not recorded

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(50):
                x = x * 2
                torch.zeros(x.shape)
            return x

    flow = record(Net(), torch.zeros(4))
    products = [node for node in flow.nodes if node.name == "mul"]
    assert len(products) == 50
    for before, after in itertools.pairwise(products):
        assert after.inputs == (before.index,)


def test_modes_are_restored_module_by_module_even_after_an_error():
    model = ResidualCnn().train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [module.training for module in model.modules()] == modes
