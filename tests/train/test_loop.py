"""`train` keeps the best model it saw, the start included, and explains what stops it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import TrainingError
from bitwright.flow.evaluate import evaluate
from bitwright.flow.prepare import prepare
from bitwright.plan.plan import Plan
from bitwright.train.loop import History, train
from bitwright.train.schedule import Schedule
from models import Mlp, ResidualCnn, image, with_statistics
from nets import calibrated, one_thread, unequal_kernels  # noqa: F401

Batch = tuple[Tensor, Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def problem(items: int = 256) -> list[Batch]:
    """Classes of a random teacher: learnable, not trivial."""
    generator = torch.Generator().manual_seed(7)
    teacher = torch.randn(16, 4, generator=generator)
    x = torch.randn(items, 16, generator=generator)
    return [(part, (part @ teacher).argmax(1)) for part in x.split(64)]


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    """A float model that has learned the problem."""
    torch.manual_seed(0)
    net = Mlp()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(12):
        for batch in problem():
            optimizer.zero_grad()
            cross_entropy(net, batch).backward()
            optimizer.step()
    return net


def start(net: nn.Module, preset: str = "w4a4", **rules: str) -> nn.Module:
    data = problem()
    everything = {"4.weight": "int4/channel", "4.input": "uint4/asym", **rules}
    return calibrated(net, Plan.preset(preset, net, data[0][0], sites=everything), [x for x, _ in data])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def total_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(cross_entropy(model, batch).item() for batch in problem())


@pytest.mark.parametrize("weight", ["int4/channel", "int2/channel"])
def test_training_improves_over_the_calibrated_start(weight: str, learned: nn.Module) -> None:
    model = start(learned, **{"*.weight": weight, "*.input": "uint4/asym"})
    before, accuracy = total_loss(model), evaluate(model, problem())
    schedule = Schedule(steps=100, lr=5.0)
    history = train(model, cross_entropy, problem(), schedule=schedule, score=lambda m: -total_loss(m))
    assert total_loss(model) < 0.8 * before
    assert evaluate(model, problem()) >= accuracy
    assert history.best_score == -total_loss(model)
    assert history.scores[0] == (0, -before)
    assert not model.training
    assert unequal_kernels(model, [x for x, _ in problem()[:2]]) == []


def test_the_first_loss_is_the_loss_of_the_calibrated_model() -> None:
    net, x, y = with_statistics(ResidualCnn()), image(8, 12), torch.randint(5, (8,))
    model = calibrated(net, "w4a4", [x])
    expected = cross_entropy(model, (x, y)).item()
    history = train(model, cross_entropy, [(x, y)], schedule=Schedule(steps=3, lr=1.0, freeze_norms=0.0))
    assert history.losses[0] == expected  # with statistics that are frozen: else batch norms see the batch
    assert len(history.losses) == 3
    assert history.losses[1] != expected


def test_a_score_that_only_falls_gives_the_start_back(learned: nn.Module) -> None:
    model = start(learned)
    before = state(model)
    scores = iter(range(0, -100, -1))
    history = train(model, cross_entropy, problem(), schedule=Schedule(steps=20, lr=5.0), score=lambda m: next(scores))
    assert history.best_step == 0
    assert history.best_score == 0
    assert len(history.scores) == 11
    assert same(state(model), before)


def test_the_best_state_in_the_middle_is_kept(learned: nn.Module) -> None:
    model, seen = start(learned), []

    def score(current: nn.Module) -> float:
        assert not current.training
        seen.append(state(current))
        return [0.1, 0.2, 0.9, 0.9, 0.3][len(seen) - 1]

    history = train(model, cross_entropy, problem(), schedule=Schedule(steps=8, lr=5.0), score=score, score_every=2)
    assert history.scores == [(0, 0.1), (2, 0.2), (4, 0.9), (6, 0.9), (8, 0.3)]
    assert (history.best_step, history.best_score) == (4, 0.9)
    assert same(state(model), seen[2])
    assert not same(seen[2], seen[3])


@pytest.mark.parametrize(
    ("middle", "end", "kept"),
    [
        ([1] * 60 + [0] * 40, [1] * 58 + [0] * 42, 4),  # two items fewer of 100: by chance
        ([1] * 60 + [0] * 40, [0] * 12 + [1] * 48 + [0] * 40, 2),  # twelve items fewer, none more: worse
        ([1] * 31 + [0] * 69, [1] * 29 + [0] * 71, 2),  # by chance, but below the start
    ],
)
def test_scores_of_items_tell_luck_from_progress(
    middle: list[int], end: list[int], kept: int, learned: nn.Module
) -> None:
    scores = iter([[1] * 30 + [0] * 70, middle, end])
    history = train(
        start(learned),
        cross_entropy,
        problem(),
        schedule=Schedule(steps=4, lr=5.0),
        score=lambda m: torch.tensor(next(scores)),
        score_every=2,
    )
    assert history.best_step == kept
    assert history.scores[1] == (2, sum(middle) / 100)


def test_without_a_score_the_last_state_is_kept(learned: nn.Module) -> None:
    model = start(learned)
    history = train(model, cross_entropy, problem(), schedule=Schedule(steps=7, lr=5.0))
    assert history.best_step == 7
    assert history.scores == []
    assert str(history.best_score) == "nan"
    assert not same(state(model), state(start(learned)))


def test_the_same_seed_gives_the_same_model_bit_for_bit(learned: nn.Module) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        model = start(learned)
        loader = torch.utils.data.DataLoader([(x, y) for x, y in zip(*problem()[0], strict=True)], 16, shuffle=True)
        train(model, cross_entropy, loader, schedule=Schedule(steps=20, lr=2.0), score=lambda m: evaluate(m, problem()))
        results.append(state(model))
    assert same(*results)


def test_train_is_the_plain_loop_that_a_user_would_write(learned: nn.Module) -> None:
    ours, theirs = start(learned), start(learned)
    data, schedule = problem(), Schedule(steps=12, lr=2.0)
    train(ours, cross_entropy, data, schedule=schedule)
    optimizer = schedule.optimizer(theirs)
    for step in range(12):
        theirs.train()
        schedule.apply(theirs, step, optimizer)
        optimizer.zero_grad()
        cross_entropy(theirs, data[step % len(data)]).backward()
        torch.nn.utils.clip_grad_norm_([p for p in optimizer.param_groups[2]["params"] if p.grad is not None], 1.0)
        optimizer.step()
    assert same(state(ours), state(theirs))


def test_gradients_of_scales_are_clipped_and_those_of_weights_are_not(learned: nn.Module) -> None:
    model = start(learned)
    schedule = Schedule(steps=4, lr=1e-6)
    optimizer = schedule.optimizer(model)
    norms: list[tuple[float, float]] = []

    def on_step(step: int, loss: float) -> None:
        groups = [[p.grad for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        weights, _, scales = (
            torch.cat([g.flatten() for g in grads]).norm().item() if grads else 0.0 for grads in groups
        )
        norms.append((weights, scales))

    loss = lambda m, batch: 1e6 * cross_entropy(m, batch)  # noqa: E731
    train(model, loss, problem(), schedule=schedule, optimizer=optimizer, on_step=on_step)
    assert [round(scales, 3) for _, scales in norms] == [0.0, 1.0, 1.0, 0.0]
    assert all(weights > 100 for weights, _ in norms)


def test_an_interrupt_leaves_the_best_state_and_eval_mode(learned: nn.Module) -> None:
    model, seen = start(learned), []

    def score(current: nn.Module) -> float:
        seen.append(state(current))
        return [0.0, 2.0, 1.0][len(seen) - 1]

    def on_step(step: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            model,
            cross_entropy,
            problem(),
            schedule=Schedule(steps=20, lr=5.0),
            score=score,
            score_every=2,
            on_step=on_step,
        )
    assert len(seen) == 3
    assert same(state(model), seen[1])
    assert not model.training
    assert unequal_kernels(model, [problem()[0][0]]) == []


def exhausted() -> Iterator[Batch]:
    yield from problem()[:3]


FAILURES: dict[str, tuple[Callable[[nn.Module, Batch], object], object, str]] = {
    "nan": (lambda m, b: cross_entropy(m, b) * torch.nan, problem(), r"the loss is nan at step 0; lower Schedule\(lr="),
    "inf": (lambda m, b: cross_entropy(m, b) * torch.inf, problem(), "the loss is inf at step 0"),
    "no gradient": (
        torch.no_grad()(cross_entropy),
        problem(),
        r"loss has no gradient: is the forward inside torch\.no_grad",
    ),
    "not a scalar": (lambda m, b: m(b[0]), problem(), "must return a scalar tensor"),
    "not a tensor": (lambda m, b: 1.0, problem(), "must return a scalar tensor"),
    "generator": (cross_entropy, exhausted(), "batches ran out after 3 of 9 steps; pass a list or a DataLoader"),
    "empty": (cross_entropy, [], "batches ran out after 0 of 9 steps"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_what_stops_training_is_explained_and_the_best_state_kept(kind: str, learned: nn.Module) -> None:
    loss, batches, message = FAILURES[kind]
    model = start(learned)
    before = state(model)
    with pytest.raises(TrainingError, match=message):
        train(model, loss, batches, schedule=Schedule(steps=9, lr=5.0), score=lambda m: 0.0)  # type: ignore[arg-type]
    assert same(state(model), before)
    assert not model.training


def test_a_loss_that_becomes_nan_later_names_its_step(learned: nn.Module) -> None:
    model, calls = start(learned), []

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return cross_entropy(m, batch) * (torch.nan if len(calls) == 5 else 1.0)

    with pytest.raises(TrainingError, match="the loss is nan at step 4"):
        train(model, loss, problem(), schedule=Schedule(steps=9, lr=1.0))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_score_that_is_no_number_is_refused(learned: nn.Module) -> None:
    with pytest.raises(TrainingError, match="score returned NaN at step 0; it must return a number, larger is better"):
        train(start(learned), cross_entropy, problem(), schedule=Schedule(steps=2), score=lambda m: float("nan"))


def test_an_uncalibrated_model_is_refused() -> None:
    net = Mlp()
    prepared = prepare(net, Plan.preset("w8a8", net, problem()[0][0]))
    with pytest.raises(TrainingError, match=r"0\.weight has no scale yet; call bitwright\.calibrate before training"):
        train(prepared, cross_entropy, problem(), schedule=Schedule(steps=2))


def test_a_generator_of_the_right_length_is_enough(learned: nn.Module) -> None:
    history = train(start(learned), cross_entropy, exhausted(), schedule=Schedule(steps=3))
    assert isinstance(history, History)
    assert len(history.losses) == 3


def test_training_can_be_continued_with_another_schedule(learned: nn.Module) -> None:
    model = start(learned)
    train(model, cross_entropy, problem(), schedule=Schedule(steps=8, lr=1.0))
    twin = copy.deepcopy(model)
    history = train(model, cross_entropy, problem(), schedule=Schedule(steps=8, lr=1.0))
    assert len(history.losses) == 8
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, twin.state_dict()[name])}
    assert {"0.weight", "2.weight", "4.weight", "2.weight_quantizer.scale"} <= moved
