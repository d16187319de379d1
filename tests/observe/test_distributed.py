"""Two real processes (this one and another) agree on one answer: that of a single process that saw all data."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bitwright.errors import CalibrationError, SpecError
from bitwright.numerics.spec import QuantSpec
from bitwright.observe.histogram import Histogram
from bitwright.observe.observer import make_observer
from bitwright.observe.ranks import average_gradients, before, first, gathered, sums, together, total

SPECS = ["uint8/asym", "int8", "uint4/asym", "ternary"]
NAMES = ["minmax", "percentile:99.9", "mse", "kl", "ema:0.5"]


def scenes() -> dict[str, list[list[Tensor]]]:
    """For each scene the batches of rank 0 and of rank 1."""
    random = torch.Generator().manual_seed(11)

    def normal(size: float, count: int = 4000) -> Tensor:
        return torch.randn(count, generator=random) * size

    return {
        "alike": [[normal(1), normal(1)], [normal(1), normal(1)]],
        "other scales": [[normal(1e-4), normal(0.01)], [normal(300), normal(7, 17)]],
        "far from zero": [[normal(1) + 1000], [normal(0.001) + 1023.99, normal(5) + 4000]],
        "zeros on one rank": [[torch.zeros(50)], [normal(1e6)]],
        "nothing on one rank": [[], [normal(0.3), normal(2)]],
        "nothing anywhere": [[], []],
    }


ERRORS: dict[str, tuple[Exception | None, Exception | None]] = {
    "none": (None, None),
    "the kind, on one": (None, SpecError("no")),
    "the kind, on both": (SpecError("first"), SpecError("second")),
    "another, on one": (RuntimeError("broken"), None),
    "another and the kind": (SpecError("no"), RuntimeError("broken")),
}


def _agree(rank: int) -> dict[tuple[str, ...], object]:
    found: dict[tuple[str, ...], object] = {
        ("gathered",): gathered(f"from {rank}"),
        ("first",): first(rank + 5),
        ("sums",): sums(rank + 1, 0.5),
        ("before",): before(rank + 3),
        ("total",): total(torch.arange(6.0).view(2, 3).mT * (rank + 1)),
        ("total of one",): total(torch.ones(2, dtype=torch.float64) if rank else torch.zeros(0)),
        ("total of none",): total(torch.zeros(0)),
    }
    weights = [torch.ones(2, requires_grad=True), torch.ones(1, 3, requires_grad=True)]
    (weights[rank].square().sum() * (1 + rank)).backward()
    average_gradients(weights)
    found["gradients",] = [weight.grad for weight in weights]
    for scene, failures in ERRORS.items():
        failure, found["together", scene] = failures[rank], "passed"
        try:
            with together(SpecError):
                if failure is not None:
                    raise failure
        except Exception as error:
            found["together", scene] = f"{type(error).__name__}: {error}"
    return found


def _observe(rank: int, folder: str) -> None:
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=wait)
    found = _agree(rank)
    for scene, ranks in scenes().items():
        for name in NAMES:
            observer = make_observer(name)
            for batch in ranks[rank]:
                observer.update(batch)
            observer.reduce()
            for text in SPECS:
                try:
                    params = observer.qparams(QuantSpec.parse(text))
                    found[scene, name, text] = (params.scale, params.zero_point)
                except CalibrationError as error:
                    found[scene, name, text] = str(error)
        histogram = Histogram()
        for batch in ranks[rank]:
            histogram.update(batch)
        histogram.reduce()
        found[scene, "histogram"] = (histogram.exponent, histogram.first, histogram.counts)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gloo")
    other = mp.get_context("spawn").Process(target=_observe, args=(1, str(folder)))
    other.start()
    _observe(0, str(folder))
    other.join()
    assert other.exitcode == 0
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def alone(scene: str, name: str, text: str) -> tuple[Tensor, Tensor | None]:
    observer = make_observer(name)
    for batch in [batch for batches in scenes()[scene] for batch in batches]:
        observer.update(batch)
    params = observer.qparams(QuantSpec.parse(text))
    return params.scale, params.zero_point


SEEN = [scene for scene in scenes() if scene != "nothing anywhere"]


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("name", ["minmax", "percentile:99.9", "mse", "kl"])
@pytest.mark.parametrize("scene", SEEN)
def test_both_ranks_end_with_the_answer_of_one_process_that_saw_everything(ranks, scene, name, text):
    scale, zero_point = alone(scene, name, text)
    for found in ranks:
        assert torch.equal(found[scene, name, text][0], scale)
        if zero_point is not None:
            assert torch.equal(found[scene, name, text][1], zero_point)


@pytest.mark.parametrize("scene", SEEN)
def test_histograms_merge_exactly(ranks, scene):
    single = Histogram()
    for batch in [batch for batches in scenes()[scene] for batch in batches]:
        single.update(batch)
    for found in ranks:
        exponent, first, counts = found[scene, "histogram"]
        assert (exponent, first) == (single.exponent, single.first)
        assert torch.equal(counts, single.counts)


@pytest.mark.parametrize("scene", SEEN)
def test_averages_end_with_the_mean_over_the_ranks_that_saw_data(ranks, scene):
    def average(batches: list[Tensor], of: Callable[[Tensor], Tensor]) -> float:
        value = of(batches[0])
        for batch in batches[1:]:
            value = 0.5 * value + 0.5 * of(batch)
        return value.item()

    used = [batches for batches in scenes()[scene] if batches]
    lo, hi = (sum(average(batches, of) for batches in used) / len(used) for of in (torch.min, torch.max))
    for found in ranks:
        scale = found[scene, "ema:0.5", "uint8/asym"][0].item()
        assert scale == pytest.approx((max(hi, 0) - min(lo, 0)) / 255, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_in_which_no_rank_saw_data_ends_in_an_error_on_every_rank(ranks, name):
    for found in ranks:
        assert "saw no values" in found["nothing anywhere", name, "uint8/asym"]


def test_what_ranks_know_together(ranks):
    for rank, found in enumerate(ranks):
        assert found["gathered",] == ["from 0", "from 1"]
        assert found["first",] == 5
        assert found["sums",] == [3, 1.0]
        assert found["before",] == 3 * rank
        assert torch.equal(found["total",], 3 * torch.arange(6.0).view(2, 3).mT)
        assert torch.equal(found["total of one",], torch.ones(2, dtype=torch.float64))
        assert torch.equal(found["total of none",], torch.zeros(0))
        assert torch.equal(found["gradients",][0], torch.ones(2))
        assert torch.equal(found["gradients",][1], torch.full((1, 3), 2.0))


@pytest.mark.parametrize(
    ("scene", "texts"),
    [
        ("none", ["passed", "passed"]),
        ("the kind, on one", ["SpecError: rank 1: no"] * 2),
        ("the kind, on both", ["SpecError: rank 0: first"] * 2),
        ("another, on one", ["RuntimeError: broken", "CalibrationError: rank 0: broken"]),
        ("another and the kind", ["CalibrationError: rank 1: broken", "RuntimeError: broken"]),
    ],
)
def test_an_error_on_one_rank_is_one_on_all(ranks, scene, texts):
    assert [found["together", scene] for found in ranks] == texts
