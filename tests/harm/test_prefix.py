"""What runs before a changed layer is taken from a record: same numbers, less work."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.harm import prefix
from bitwright.harm.prefix import Prefix


class Block(nn.Module):
    """A residual block that changes its activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.two(F.relu_(self.one(x))).add_(x))


class Net(nn.Module):
    """Blocks, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.twice, self.head = (
            nn.Linear(4, 6),
            nn.Sequential(Block(), Block()),
            Block(),
            nn.Linear(6, 3),
        )
        self.calls = 0
        self.stem.register_forward_pre_hook(lambda *_: self.count())

    def count(self) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.body(self.twice(self.stem(x)))))


class Writer(nn.Module):
    """Leaves something behind beside its output."""

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(2 * x)
        return x + 1


class Caching(nn.Module):
    """The first module writes a cache that ``read`` needs at the end."""

    def __init__(self, read: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.read = Writer(), nn.Linear(4, 4), read

    def forward(self, x: Tensor) -> Tensor:
        cache: list[Tensor] = []
        return self.two(self.one(x, cache)) + self.read(cache)


@torch.no_grad()
def see(model: nn.Module, batch: Tensor) -> list[Tensor]:
    return [model(batch).double()]


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, 4, generator=generator) for _ in range(3)]


def changed_at(model: nn.Module, path: str) -> nn.Module:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_submodule(path).weight.mul_(1.25)
    return changed


def equal(found: list[list[Tensor]], model: nn.Module) -> bool:
    return all(torch.equal(one[0], see(model, batch)[0]) for one, batch in zip(found, data(), strict=True))


PATHS = ["stem", "body.0.one", "body.0.two", "body.1.one", "twice.two", "head"]


@pytest.mark.parametrize("paths", [PATHS, PATHS[::-1]], ids=["forwards", "backwards"])
def test_numbers_are_those_of_the_whole_model(paths: list[str]) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    record = Prefix(model, data(), see)
    for path in paths:
        record.reach([path])
        assert equal(list(record.seen(changed_at(model, path))), changed_at(model, path)), path
        assert equal(list(record.seen(model)), model)


def test_only_what_lies_behind_runs() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    record = Prefix(model, data(), see)
    outputs = {}
    for path in PATHS:
        record.reach([path])
        outputs[path] = sorted(record.outputs[0])
    assert outputs == {
        "stem": [],
        "body.0.one": ["stem"],
        "body.0.two": ["body.0.one", "stem"],
        "body.1.one": ["body.0", "stem"],
        "twice.two": ["stem"],  # twice.one runs again behind the body
        "head": ["body", "stem", "twice"],
    }
    record.reach(["head", "body.1.two"])  # as far as the first of them
    assert sorted(record.outputs[0]) == ["body.0", "body.1.one", "stem"]
    record.reach(["nowhere"])
    assert record.outputs == [{}, {}, {}]


def test_other_weights_before_the_layer_are_not_left_out() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    record = Prefix(model, data(), see)
    record.reach(["head"])
    both = changed_at(changed_at(model, "head"), "body.1.two")
    assert equal(list(record.seen(both)), both)


def test_modules_have_their_own_forward_again() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    own = model.stem.forward
    model.stem.forward = lambda x: own(x) + 1  # as some wrappers do
    wrapped = model.stem.forward
    record = Prefix(model, data(), see)
    record.reach(["head"])
    list(record.seen(model))
    assert model.stem.forward is wrapped
    assert "forward" not in vars(model.body)


@pytest.mark.parametrize("read", [lambda cache: cache[0], sum], ids=["fails without", "differs without"])
def test_modules_with_side_effects_run(read: Callable[[list[Tensor]], Tensor]) -> None:
    torch.manual_seed(0)
    model = Caching(read).eval()
    record = Prefix(model, data(), see)
    record.reach(["two"])
    changed = changed_at(model, "two")
    assert equal(list(record.seen(changed)), changed)
    assert record.outputs == [{}, {}, {}]


def test_what_memory_does_not_hold_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    record = Prefix(model, data(), see)
    monkeypatch.setattr(prefix, "_MEMORY", 1)
    record.reach(["head"])
    assert [sorted(found) for found in record.outputs] == [["body", "stem", "twice"], [], []]
    assert equal(list(record.seen(changed_at(model, "head"))), changed_at(model, "head"))
