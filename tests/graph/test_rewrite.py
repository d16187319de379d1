"""Naming functional adds: the function stays the same bit for bit, or the model is left alone and the reason given."""

from __future__ import annotations

import copy
import operator
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import ModelError
from bitwright.graph.calls import Add
from bitwright.graph.dataflow import record
from bitwright.graph.patterns import residual_adds
from bitwright.graph.rewrite import name_calls, why_not_nameable
from models import Block, Encoder, ResidualCnn, SharedReluBlock, image, with_statistics


class Net(nn.Module):
    """``forward`` is the function given; it sees this module with two convolutions, a norm and a ReLU."""

    def __init__(self, body) -> None:
        super().__init__()
        self.conv, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.bn, self.relu, self.drop = nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.branch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        type(self).body = staticmethod(body)

    def forward(self, x: Tensor) -> Tensor:
        return type(self).body(self, x)


def net(body) -> nn.Module:
    return with_statistics(type("Net", (Net,), {})(body))


# --- what can be named -----------------------------------------------------------------------------------------


def in_place(self, x):
    y = self.bn(self.conv(x))
    y += x
    return self.relu(y)


def in_place_method(self, x):
    y = self.conv(x).add_(x)
    return F.relu_(y)


def two_adds(self, x):
    y = self.relu(self.conv(x) + x)
    return self.second(y) + y


def in_place_on_a_branch(self, x):
    y = self.branch(x)
    y += self.second(x)
    return y


def in_place_on_a_new_tensor(self, x):
    y = F.relu(self.conv(x)) * 2
    y += x
    return y


def with_other_arithmetic(self, x):
    y = self.conv(x)
    y *= 0.5
    z = y - x
    z /= 2
    return z + x


def with_shapes_and_slices(self, x):
    x = F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]
    return torch.cat([self.conv(x), x], 1).chunk(2, 1)[0] + x.reshape(x.shape)


NAMEABLE = {
    "functional": (lambda self, x: F.relu(self.bn(self.conv(x)) + x), 1),
    "torch.add": (lambda self, x: torch.add(x, self.conv(x)), 1),
    "method": (lambda self, x: self.conv(x).add(x), 1),
    "operator": (lambda self, x: operator.add(x, self.conv(x)), 1),
    "in place": (in_place, 1),
    "in place method": (in_place_method, 1),
    "two adds": (two_adds, 2),
    "in place on a branch": (in_place_on_a_branch, 1),
    "in place on a new tensor": (in_place_on_a_new_tensor, 1),
    "other arithmetic": (with_other_arithmetic, 1),
    "shapes and slices": (with_shapes_and_slices, 1),
}


@pytest.mark.parametrize("name", NAMEABLE)
@pytest.mark.parametrize("training", [False, True])
def test_named_adds_compute_the_same_bits(name, training):
    body, count = NAMEABLE[name]
    model = net(body).train(training)
    assert why_not_nameable(model, "add", count) == ""
    named = copy.deepcopy(model)
    name_calls(named, "add", range(count))
    x = image()
    wanted, found = model(x.clone()), named(x.clone())
    assert torch.equal(found, wanted)
    for key, value in model.state_dict().items():  # running statistics included
        assert torch.equal(named.state_dict()[key], value), key
    assert [type(getattr(named, f"add_{i}")) for i in range(count)] == [Add] * count


@pytest.mark.parametrize("name", NAMEABLE)
def test_gradients_are_the_same_bits_too(name):
    body, count = NAMEABLE[name]
    model = net(body)
    named = copy.deepcopy(model)
    name_calls(named, "add", range(count))
    x = image()
    for m in (model, named):
        m(x.clone()).square().sum().backward()
    for (key, wanted), found in zip(model.named_parameters(), named.parameters(), strict=True):
        assert (wanted.grad is None) == (found.grad is None), key
        assert wanted.grad is None or torch.equal(found.grad, wanted.grad), key


def test_the_named_module_is_called_once_per_add():
    model = net(two_adds).eval()
    name_calls(model, "add", [0, 1])
    flow = record(model, image())
    assert [node.name for node in flow.nodes if "add" in node.name] == ["add_0", "add_1"]


def test_only_the_chosen_adds_are_named_and_the_others_stay_in_place():
    def body(self, x):
        y = self.conv(x)
        kept = y.view(-1)
        y += x
        z = self.second(y) + y
        return z * kept.view(z.shape)

    model = net(body).eval()
    named = copy.deepcopy(model)
    name_calls(named, "add", [1])
    assert not hasattr(named, "add_0")
    x = image()
    assert torch.equal(named(x), model(x))


@pytest.mark.parametrize("make", [lambda: Block(3, 3), lambda: Block(3, 6, 2), lambda: SharedReluBlock(3)])
def test_naming_keeps_keys_class_hooks_modes_and_copies(make):
    model = with_statistics(make()).train()
    cls, keys, code = type(model), list(model.state_dict()), model.forward.__func__
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    name_calls(model, "add", [0])
    assert isinstance(model, cls)
    assert (type(model).__name__, type(model).__module__) == (cls.__name__, cls.__module__)
    assert cls.forward is code, "the class of the user is untouched"
    assert list(model.state_dict()) == keys
    assert model.training
    assert model.eval().add_0.training is False
    twin = copy.deepcopy(model)
    x = image()
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        twin.conv1.weight.zero_()
        assert not torch.equal(twin(x), model(x)), "a copy shares nothing"
    assert calls == ["hook"] * 4
    assert make()(x).shape == model(x).shape


def test_all_residual_adds_of_the_residual_net_can_be_named():
    model = with_statistics(ResidualCnn()).eval()
    x = image()
    wanted = model(x)
    owners = [node.owner for node in residual_adds(record(model, x), model)]
    assert len(owners) == 3
    for owner in owners:
        assert why_not_nameable(model.get_submodule(owner), "add", 1) == ""
        name_calls(model.get_submodule(owner), "add", [0])
    assert torch.equal(model(x), wanted)
    assert residual_adds(record(model, x), model) == []


def test_adds_of_the_encoder_are_numbered_in_the_order_of_the_record():
    model = Encoder().eval()
    x = torch.randn(2, 5, 16)
    flow, wanted = record(model, x), model(x)
    ordinals = [node.ordinal for node in residual_adds(flow, model)]
    assert ordinals == [2, 3]  # two rotary adds come first
    assert why_not_nameable(model, "add", 4) == ""
    name_calls(model, "add", ordinals)
    assert torch.equal(model(x), wanted)
    assert residual_adds(record(model, x), model) == []


# --- what cannot ----------------------------------------------------------------------------------------------------


def used_through_a_view(self, x):
    y = self.conv(x)
    flat = y.flatten(1)
    flat += x.flatten(1)
    return y * 2


def used_through_dropout(self, x):
    y = self.conv(x)
    kept = self.drop(y)
    kept += x
    return y * 2


def used_under_another_name(self, x):
    y = self.conv(x)
    z = y.view_as(x)
    y += x
    return z * 2


def callers_tensor(self, x):
    x += self.conv(x)
    return x


def view_of_callers_tensor(self, x):
    y = x[:, :3]
    y += self.conv(x)
    return y


def result_ignored(self, x):
    y = self.conv(x)
    y.add_(x)
    return y


REFUSED = {
    "used through a view": (used_through_a_view, "the in-place add iadd overwrites a tensor that is used again"),
    "used under another name": (
        used_under_another_name,
        "the in-place add iadd overwrites a tensor that is used again",
    ),
    "used through dropout": (used_through_dropout, "the in-place add iadd overwrites a tensor that is used again"),
    "result ignored": (result_ignored, "the in-place add add_ overwrites a tensor that is used again"),
    "callers tensor": (callers_tensor, "the in-place add iadd overwrites x, which belongs to the caller"),
    "view of callers tensor": (view_of_callers_tensor, "overwrites x, which belongs to the caller"),
    "keyword": (lambda self, x: torch.add(x, self.conv(x), alpha=2), r"the add add has keyword arguments \(alpha\)"),
    "train and eval": (
        lambda self, x: self.conv(x) + F.dropout(x, 0.5, self.training),
        "its forward differs between train and eval mode",
    ),
    "control flow": (lambda self, x: self.conv(x) + x if x.sum() > 0 else x, "cannot be traced"),
    "two adds when traced": (
        lambda self, x: self.conv(x).view(x.shape[0] + 0, 3, 8, 8) + x,
        "shows 2 adds when traced and 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_add_that_cannot_be_named_is_refused_with_the_reason_and_the_model_left_alone(name):
    body, reason = REFUSED[name]
    model = net(body).train()
    before = (type(model), list(model.state_dict()), set(dict(model.named_modules())))
    assert re.search(reason, why_not_nameable(model, "add", 1))
    if (
        name != "two adds when traced"
    ):  # the first add of that trace could be named, it is only not the one of the record
        with pytest.raises((ModelError, torch.fx.proxy.TraceError)):
            name_calls(model, "add", [0])
    assert (type(model), list(model.state_dict()), set(dict(model.named_modules()))) == before
    assert all(module.training for module in model.modules())


def test_optional_arguments_are_refused_because_a_trace_cannot_see_whether_they_were_given():
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            return self.conv(x) + (x if skip is None else skip)

    assert "its forward has optional arguments (skip)" in why_not_nameable(Optional(), "add", 1)


def test_a_child_that_has_the_name_already_is_not_replaced():
    model = net(NAMEABLE["functional"][0])
    model.add_0 = Add()
    mine = model.add_0
    assert why_not_nameable(model, "add", 1) == "Net has an attribute add_0 already"
    with pytest.raises(ModelError, match="Net has an attribute add_0 already"):
        name_calls(model, "add", [0])
    assert model.add_0 is mine


def test_an_add_that_does_not_exist_is_refused_with_the_number_that_does():
    with pytest.raises(ModelError, match=r"Block\.forward has 1 adds, the plan names add_3; make a new plan"):
        name_calls(Block(3, 3), "add", [3])


def test_the_count_of_the_record_must_be_the_count_of_the_trace():
    assert why_not_nameable(Block(3, 3), "add", 2) == "Block.forward shows 1 adds when traced and 2 when run"
