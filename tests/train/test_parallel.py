"""Two real processes train one model: they stay equal, and equal to one process that sees the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from bitwright.errors import TrainingError
from bitwright.flow.calibrate import calibrate
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.plan.plan import Plan
from bitwright.train.loop import train
from bitwright.train.parallel import average_statistics
from bitwright.train.schedule import Schedule
from bitwright.train.step import StepRules
from nets import one_thread, unequal_kernels  # noqa: F401

STEPS, KEEP = 16, {"conv2": 1.0}


class Net(nn.Module):
    """Folded and lonely batch norms, one without affine parameters, one with a cumulative average."""

    def __init__(self, lonely: bool) -> None:
        super().__init__()
        self.lonely = nn.BatchNorm2d(2, affine=False) if lonely else nn.Identity()
        self.conv1, self.norm1 = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, momentum=None)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(self.lonely(x))).relu()
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(48, 2, 8, 8, generator=generator) * torch.linspace(0.5, 2, 48).view(-1, 1, 1, 1)
    y = (x.mean((1, 2, 3)) > 0).long() + (x[:, 0].mean((1, 2)) > 0).long()
    return list(zip(x.split(8), y.split(8), strict=True))


def ready(batches: list[tuple[Tensor, Tensor]], *, lonely: bool = True) -> nn.Module:
    torch.manual_seed(1)
    net, x = Net(lonely), torch.cat([x for x, _ in data()])
    for _ in range(5):
        net(x)
    observers = {"weight": "minmax", "input": "minmax"}
    rules = {"fc.weight": "int4/channel", "fc.input": "uint8/asym"}
    model = prepare(net, Plan.preset("w4a8", net, x[:2], sites=rules, observers=observers))
    calibrate(model, [x for x, _ in batches])
    return model.eval()


def half(rank: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[rank::2], y[rank::2]) for x, y in data()]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def schedule(*, freeze_norms: float | None = None) -> Schedule:
    return Schedule(steps=STEPS, lr=1.0, sensitivity=KEEP, freeze_norms=freeze_norms)


def score(model: nn.Module) -> float:
    with torch.no_grad():
        return -sum(loss(model, batch).item() for batch in half(dist.get_rank() if dist.is_initialized() else 0))


def shipped(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in convert(model).state_dict().items() if isinstance(value, Tensor)}


def with_ddp(rank: int, folder: str, *, lonely: bool = True) -> dict[str, Any]:
    """Without the lonely norm, the others are frozen too: unfrozen norms normalise with their rank's part."""
    model = ready(half(rank), lonely=lonely)
    start = copy.deepcopy(model.state_dict())
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    history = train(wrapped, loss, half(rank), schedule=schedule(freeze_norms=None if lonely else 0.0))
    assert unequal_kernels(model, [data()[0][0]]) == []
    return {
        "start": start,
        "model": model.state_dict(),
        "shipped": shipped(model),
        "losses": history.losses,
    }


def with_ddp_and_folded_norms(rank: int, folder: str) -> dict[str, Any]:
    return with_ddp(rank, folder, lonely=False)


def with_a_score(rank: int, folder: str) -> dict[str, Any]:
    model = ready(half(rank))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    history = train(wrapped, loss, half(rank), schedule=schedule(), score=score)
    return {"model": model.state_dict(), "scores": history.scores, "own": score(model)}


def with_nan_on_one_rank(rank: int, folder: str) -> dict[str, Any]:
    model, calls = ready(half(rank)), []

    def bad(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        return loss(model, batch) * (torch.nan if len(calls) == 4 and rank == 1 else 1.0)

    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    history = train(wrapped, bad, half(rank), schedule=schedule(), on_nan="skip")
    return {"model": model.state_dict(), "skipped": history.skipped}


def with_a_stop(rank: int, folder: str) -> dict[str, Any]:
    found = {}
    for name, stop in (("whole", None), ("parts", 9), ("parts", None)):
        model = ready(half(rank))
        torch.manual_seed(10 + rank)

        def on_step(step: int, _: float, stop: int | None = stop) -> None:
            if step == stop:
                raise KeyError

        settings: dict[str, Any] = {"checkpoint": Path(folder) / name, "checkpoint_every": 4, "on_step": on_step}
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        try:
            train(wrapped, loss, half(rank), schedule=schedule(), **settings)
        except KeyError:
            pass
        dist.barrier()
        found[name] = {**model.state_dict(), "draw": torch.rand(2)}
    return found


def with_shards(rank: int, folder: str) -> dict[str, Any]:
    model = ready(half(rank), lonely=False)
    whole = copy.deepcopy(model)
    for layer in (model.conv1, model.conv2, model.fc):
        fully_shard(layer)
    fully_shard(model)
    train(model, loss, half(rank), schedule=schedule(freeze_norms=0.0))
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    state = get_model_state_dict(model, options=options)
    whole.load_state_dict(state)
    return {"model": state, "shipped": shipped(whole.eval())}


def with_shards_and_live_norms(rank: int, folder: str) -> dict[str, Any]:
    model = ready(half(rank), lonely=False)
    start = model.conv1.weight_quantizer.scale.detach().clone()
    for layer in (model.conv1, model.conv2, model.fc):
        fully_shard(layer)
    fully_shard(model)
    rules = StepRules(model, Schedule(steps=4))
    rules.before(0)
    model.norm1.running_var *= 4.0
    rules.after(0)
    return {"start": start, "scale": model.conv1.weight_quantizer.scale.full_tensor().detach()}


def with_mistakes(rank: int, folder: str) -> dict[str, Any]:
    found = {}
    for name, wrap in {"plain": lambda m: m, "freezing": DistributedDataParallel}.items():
        try:
            train(wrap(ready(half(rank))), loss, half(rank), schedule=schedule())
        except TrainingError as error:
            found[name] = str(error)
    return found


SCENES: dict[str, Callable[[int, str], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        with_ddp,
        with_ddp_and_folded_norms,
        with_a_score,
        with_nan_on_one_rank,
        with_a_stop,
        with_shards,
        with_shards_and_live_norms,
        with_mistakes,
    )
}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=wait)
    try:
        torch.save({name: scene(rank, folder) for name, scene in SCENES.items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(_work, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_ranks_are_calibrated_alike_and_as_one_process_on_all_data(ranks: list[dict[str, Any]]) -> None:
    one, other = (found["with_ddp"]["start"] for found in ranks)
    assert same(one, other)
    for name, value in ready(data()).state_dict().items():  # convolutions of other batch sizes end in other last bits
        assert torch.allclose(one[name], value, rtol=1e-5), name


@pytest.mark.slow
def test_ranks_end_with_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    one, other = (found["with_ddp"] for found in ranks)
    assert same(one["model"], other["model"])
    assert same(one["shipped"], other["shipped"])
    assert one["losses"] != other["losses"]
    moved = {name for name, value in one["model"].items() if not torch.equal(value, one["start"][name])}
    assert {"conv1.weight", "conv1.weight_quantizer.scale", "norm1.running_mean", "norm2.running_var"} <= moved


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["with_ddp_and_folded_norms", "with_shards"])
def test_they_agree_with_one_process_on_the_whole_batches(scene: str, ranks: list[dict[str, Any]]) -> None:
    alone = ready(data(), lonely=False)
    train(alone, loss, data(), schedule=schedule(freeze_norms=0.0))
    for name, value in alone.state_dict().items():
        found = ranks[0][scene]["model"][name]
        if value.is_floating_point():
            difference = (found - value).norm() / value.norm().clamp(min=0.05)
            assert difference < 0.02, (name, found, value)


@pytest.mark.slow
def test_the_mean_score_of_the_ranks_decides(ranks: list[dict[str, Any]]) -> None:
    one, other = (found["with_a_score"] for found in ranks)
    assert one["scores"] == other["scores"]
    assert same(one["model"], other["model"])
    assert max(value for _, value in one["scores"]) == pytest.approx((one["own"] + other["own"]) / 2, rel=1e-6)
    assert one["own"] != other["own"]


@pytest.mark.slow
def test_sharded_training_ends_with_the_same_bits_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    one, other = (found["with_shards"] for found in ranks)
    assert same(one["model"], other["model"])
    assert same(one["shipped"], other["shipped"])


@pytest.mark.slow
def test_sharded_ranges_follow_the_norm_folded_into_their_weight(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["with_shards_and_live_norms"] for rank in ranks):
        assert torch.allclose(found["scale"], found["start"] / 2, rtol=1e-4)


@pytest.mark.slow
def test_sharded_and_replicated_training_agree(ranks: list[dict[str, Any]]) -> None:
    for name, value in ranks[0]["with_ddp_and_folded_norms"]["model"].items():
        if value.is_floating_point():
            assert torch.allclose(value, ranks[0]["with_shards"]["model"][name], rtol=1e-3, atol=1e-3), name


@pytest.mark.slow
def test_a_bad_batch_on_one_rank_is_skipped_by_all(ranks: list[dict[str, Any]]) -> None:
    one, other = (found["with_nan_on_one_rank"] for found in ranks)
    assert one["skipped"] == other["skipped"] == [3]
    assert same(one["model"], other["model"])
    assert all(value.isfinite().all() for value in one["model"].values())


@pytest.mark.slow
def test_a_distributed_run_goes_on_with_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert same(found["with_a_stop"]["whole"], found["with_a_stop"]["parts"])


@pytest.mark.slow
def test_models_that_nobody_keeps_equal_are_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "2 processes train one model" in found["with_mistakes"]["plain"]
        assert "find_unused_parameters=True" in found["with_mistakes"]["freezing"]


def test_statistics_of_one_process_are_left_alone() -> None:
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(4, 3, 2, 2))
    before = copy.deepcopy(norm.state_dict())
    average_statistics(norm)
    assert same(norm.state_dict(), before)


def _statistics(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    norms = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None))
    for x in torch.randn(5, 40, 3, generator=torch.Generator().manual_seed(0)) + 3:
        mine = x.view(2, 20, 3)[rank] + rank
        for norm in norms:
            norm(mine)
        average_statistics(norms)
    torch.save(norms.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_statistics_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(_statistics, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(one, other)
    alone = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None))
    for x in torch.randn(5, 40, 3, generator=torch.Generator().manual_seed(0)) + 3:
        for norm in alone:
            norm(x + torch.arange(2).repeat_interleave(20).view(-1, 1))
    for name, value in alone.state_dict().items():
        unbiased = 39 / 40 / (19 / 20) if name.endswith("running_var") else 1.0
        assert torch.allclose(one[name].double(), value.double(), rtol=abs(unbiased - 1) + 1e-5), name
