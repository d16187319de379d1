"""Two real processes calibrate with steps, each on its own data: equal models, as of one process that saw all data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from decoders import decoder
from torch import Tensor, nn

import bitwright as bw
from bitwright.algorithms.pipeline import outcomes
from bitwright.errors import CalibrationError
from nets import ResidualBlock, one_thread  # noqa: F401

SITES = {"*.weight": "int3/channel", "*.input": "uint4/asym"}
SHORT = {"iterations": 12, "batch": 4}
IMAGES: dict[str, list[Any]] = {
    "gptq": ["gptq"],
    "affine_repair": ["affine_repair"],
    "bias_correction": ["bias_correction"],
    "bn_reestimation": ["bn_reestimation"],
    "ranges": ["bias_correction", "ranges"],
    "cle": ["cle", "absorb_high_bias", "analytic_bias_correction"],
    "all": ["cle", "gptq", "ranges", "affine_repair", "bias_correction"],
    "adaround": [{"name": "adaround", **SHORT}],
    "adaquant": [{"name": "adaquant", **SHORT}],
    "brecq": ["gptq", {"name": "brecq", "drop": 0.5, **SHORT}],
}
TEXTS: dict[str, list[Any]] = {
    "smoothquant": ["smoothquant"],
    "awq": ["awq", "gptq"],
    "rotate": ["rotate", "gptq"],
}
METHODS = IMAGES | TEXTS
SAME = ["gptq", "affine_repair", "bias_correction", "bn_reestimation", "ranges", "cle", "all", "smoothquant", "rotate"]
"""Those whose result does not depend on which rank has which data."""


class Branches(nn.Module):
    """The middle layer runs for more than two rows only, and stands last in the list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if len(x) > 2:
            x = self.middle(x).relu()
        return self.last(x)


def images(rank: int) -> list[Tensor]:
    """Other numbers and sizes of batches, and other values, on each rank."""
    random = torch.Generator().manual_seed(rank)
    return [torch.randn(size, 3, 8, 8, generator=random) * (1 + 2 * rank) for size in ((10, 6), (4, 10, 5))[rank]]


def ids(rank: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(rank)
    return [
        torch.randint(25 * rank, 25 * rank + 25, (size, 9), generator=random) for size in ((5, 11), (7, 5, 4))[rank]
    ]


def rows(sizes: Sequence[int]) -> list[Tensor]:
    return [torch.randn(size, 6, generator=torch.Generator().manual_seed(size)) for size in sizes]


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), ResidualBlock(6, 6), nn.Flatten(), nn.Linear(384, 4)),
    )
    for _ in range(20):
        net(torch.randn(16, 3, 8, 8))
    return net.eval()


def calibrated(net: nn.Module, example: Tensor, batches: list[Tensor], steps: list[Any]) -> dict[str, Any]:
    observers = {"weight": "minmax", "input": "minmax"}
    model = bw.prepare(net, bw.Plan.preset("w8a8", net, example, sites=SITES, steps=steps, observers=observers))
    try:
        missed = bw.calibrate(model, batches)
    except CalibrationError as error:
        return {"error": str(error)}
    found = [(o.step, o.path, o.skipped, o.note, o.before, o.after) for o in outcomes(model)]
    return {"state": dict(model.state_dict()), "outcomes": found, "missed": missed}


def run(name: str, data: Callable[[Callable[[int], list[Tensor]]], list[Tensor]]) -> dict[str, Any]:
    source, net = (images, convolutions()) if name in IMAGES else (ids, decoder(blocks=1, bias=True))
    return calibrated(net, source(0)[0][:2], data(source), METHODS[name])


BRANCHES = ["gptq", "bias_correction", "affine_repair", {"name": "adaround", **SHORT}, {"name": "brecq", **SHORT}]
WRONG = torch.full((3, 6), torch.nan)
SCENES: dict[str, tuple[list[Any], tuple[list[Tensor], list[Tensor]]]] = {
    "other ways": (BRANCHES, (rows([4, 2, 5]), rows([2, 2]))),
    "other ways, the first rank shorter": (BRANCHES, (rows([2]), rows([4, 2, 5]))),
    "ways in another order": (BRANCHES, (rows([2, 4]), rows([5, 2]))),
    "nothing on one rank": (["gptq"], (rows([4]), [])),
    "nothing on one rank, no steps": ([], ([], rows([4]))),
    "nothing anywhere": (["gptq"], ([], [])),
    "not a number on one rank": (["gptq"], (rows([4]), [WRONG])),
    "does not fit on one rank": (["gptq"], ([torch.zeros(2, 5)], rows([4]))),
    "other pairs": (["cle"], (rows([2]), rows([4]))),
    "one row on one rank": ([{"name": "adaround", **SHORT}], (rows([1]), rows([4]))),
}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=wait)
    found = {name: run(name, lambda source: source(rank)) for name in METHODS}
    for name, (steps, batches) in SCENES.items():
        torch.manual_seed(3)
        found[name] = calibrated(Branches(), rows([4])[0], batches[rank], steps)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    other = mp.get_context("spawn").Process(target=_work, args=(1, str(folder)))
    other.start()
    _work(0, str(folder))
    other.join()
    assert other.exitcode == 0
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("name", METHODS)
def test_both_ranks_end_with_the_same_model_and_the_same_report(ranks, name):
    one, other = (found[name] for found in ranks)
    assert equal(one["state"], other["state"])
    assert one["outcomes"] == other["outcomes"]
    assert any(not skipped for _, _, skipped, *_ in one["outcomes"])


@pytest.mark.parametrize("name", SAME)
def test_that_model_is_the_one_of_a_single_process_with_all_data(ranks, name):
    alone, found = run(name, lambda source: source(0) + source(1)), ranks[0][name]
    for key, value in alone["state"].items():  # a code is another by a step of the grid, hundreds of times as much
        assert torch.allclose(found["state"][key], value, rtol=1e-5, atol=1e-6), key
    for (*words, before, after), (*own_words, own_before, own_after) in zip(
        found["outcomes"], alone["outcomes"], strict=True
    ):
        assert words == own_words
        assert before is own_before is None or before == pytest.approx(own_before, rel=1e-4)
        assert after is own_after is None or after == pytest.approx(own_after, rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_one_rank_alone_would_end_elsewhere(ranks, name):
    alone = run(name, lambda source: source(0))
    assert not equal(alone["state"], ranks[0][name]["state"])


@pytest.mark.parametrize(
    ("scene", "rank"), [("other ways", 1), ("other ways, the first rank shorter", 0), ("ways in another order", None)]
)
def test_a_layer_that_one_rank_does_not_reach_is_left_alone_on_all(ranks, scene, rank):
    one, other = (found[scene] for found in ranks)
    assert equal(one["state"], other["state"])
    assert one["outcomes"] == other["outcomes"]
    skipped = {(step, path): reason for step, path, reason, *_ in one["outcomes"]}
    for step in ("gptq", "bias_correction", "affine_repair", "adaround", "brecq"):
        reason = skipped[step, "middle"]
        if rank is not None:
            assert reason == f"no batch of rank {rank} reached it both in float and in simulation"
        assert "reached it both" not in skipped[step, "first"] + skipped[step, "last"]


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        ("nothing on one rank", "rank 1: step gptq of the plan needs data"),
        ("nothing on one rank, no steps", "rank 0: calibration got no batches, but 3 activations have static ranges"),
        ("nothing anywhere", "rank 0: step gptq of the plan needs data"),
        ("not a number on one rank", "rank 1: batch 0: first.input: 18 of 18 calibration values are NaN"),
        ("does not fit on one rank", "rank 0: batch 0 with shapes [[2, 5]] does not fit the model"),
    ],
)
def test_what_one_rank_lacks_is_an_error_on_all(ranks, scene, text):
    for found in ranks:
        assert text in found[scene]["error"]


def test_pairs_are_those_of_the_first_rank_and_must_hold_on_all(ranks):
    one, other = (found["other pairs"] for found in ranks)
    assert equal(one["state"], other["state"])
    assert one["outcomes"] == other["outcomes"]
    skipped = {path: reason for _, path, reason, *_ in one["outcomes"]}
    assert skipped.keys() == {"first", "last"}  # on the other rank a layer lies between
    assert "the model would compute something else" in skipped["last"]


def test_a_rank_with_too_few_rows_makes_a_reconstruction_give_up_on_all(ranks):
    one, other = (found["one row on one rank"] for found in ranks)
    assert equal(one["state"], other["state"])
    assert one["outcomes"] == other["outcomes"]
    assert "rank 0: 1 row of data reached it; at least 2 are needed" in one["outcomes"][0][2]
