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

from bitwright.errors import CalibrationError
from bitwright.numerics.spec import QuantSpec
from bitwright.observe.histogram import Histogram
from bitwright.observe.observer import make_observer

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


def _observe(rank: int, folder: str) -> None:
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=wait)
    found: dict[tuple[str, ...], object] = {}
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
