"""How ranges move in training: the rules, the moving average of extremes, and agreement of ranks."""

from __future__ import annotations

import copy
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from bitwright.errors import PlanError, SpecError
from bitwright.flow.checkpoint import load, save
from bitwright.flow.convert import convert
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.nn.ranges import RULES, get_rule
from bitwright.numerics.affine import choose_qparams
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.plan.plan import Plan
from bitwright.plan.rules import RANGE_RULES
from bitwright.plan.validate import validate
from nets import calibrated, one_thread  # noqa: F401


def quantizer(spec: str, rule: str, low: float = -1.0, high: float = 3.0) -> Quantizer:
    """A quantizer in training mode, calibrated to a range."""
    made = Quantizer("fc.input", QuantSpec.parse(spec), None, "minmax", rule)
    made.set_qparams(choose_qparams(torch.tensor([low]), torch.tensor([high]), made.spec))
    made.stage = Stage.SIMULATE
    return made.train()


def net_and_plan(rules: dict[str, str]) -> tuple[nn.Module, Plan, Tensor]:
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(16, 6)
    plan = Plan.preset("w8a8", net, x, sites={"*.weight": "int8/channel", "*.input": "uint8/asym"})
    plan.ranges.update(rules)
    return net, plan, x


def test_plans_know_exactly_the_rules_there_are() -> None:
    assert tuple(RULES) == RANGE_RULES
    assert [name for name, rule in RULES.items() if rule.learns] == ["lsq", "lsq+", "pact", "adarange"]
    assert [name for name, rule in RULES.items() if rule.tracks] == ["ema", "adarange"]
    assert [name for name, rule in RULES.items() if rule.decays] == ["pact"]


@pytest.mark.parametrize("text", ["lqs", "ema:", "ema:1", "ema:0", "ema:x", "ema:nan", "lsq:0.5", ""])
def test_misspelled_rules_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="range rule"):
        get_rule(text)
    net, plan, _ = net_and_plan({"0.input": text})
    with pytest.raises(PlanError, match=r"0\.input"):
        validate(plan, net)


@pytest.mark.parametrize(
    ("site", "rule", "message"),
    [
        ("0.weight", "ema", "weights know fixed and lsq"),
        ("0.input", "pact", "PACT clips at 0"),
        ("input", "pact", "PACT clips at 0"),
        ("nowhere", "ema", "matches none"),
    ],
)
def test_rules_that_a_site_cannot_follow_are_refused(site: str, rule: str, message: str) -> None:
    net, plan, _ = net_and_plan({site: rule})
    with pytest.raises(PlanError, match=message):
        validate(plan, net)


def test_the_last_line_that_selects_a_site_is_the_one_that_is_checked() -> None:
    net, plan, _ = net_and_plan({"input": "pact", "*.input": "ema:0.9"})
    validate(plan, net)


def test_an_offset_becomes_a_whole_zero_point() -> None:
    made = quantizer("uint4/asym", "lsq+")
    with torch.no_grad():
        made.scale.fill_(0.1)
        made.offset.fill_(-0.27)
    found = made.qparams
    assert found.zero_point.item() == 3
    assert (made.offset + found.zero_point * found.scale).item() == pytest.approx(0.03, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_gain_counts_the_elements_of_a_sample_or_of_a_channel(batch: int) -> None:
    made = quantizer("uint4/asym", "lsq")
    made.scale.requires_grad_(True)
    assert made.learning(torch.zeros(batch, 5, 3)).gain == pytest.approx(1 / math.sqrt(15 * 15))
    weight = Quantizer("fc.weight", QuantSpec.parse("int4/channel"), (6, 10), "minmax")
    weight.scale.requires_grad_(True)
    assert weight.learning(torch.zeros(6, 10)).gain == pytest.approx(1 / math.sqrt(10 * 7))
    weight.scale.requires_grad_(False)
    assert weight.learning(torch.zeros(6, 10)).rule == "none"


def test_a_pact_step_on_the_scale_is_a_step_on_its_upper_end_decay_included() -> None:
    alpha, rate, decay = 2.25, 0.1, 0.01
    made = quantizer("uint4", "pact", 0.0, alpha)
    made.scale.requires_grad_(True)
    x = torch.tensor([[-1.0, 0.4, 2.0, 2.5, 7.0]])
    assert made.rule.decays
    sgd = torch.optim.SGD([made.scale], lr=rate, weight_decay=decay)
    made.simulate(x).sum().backward()
    sgd.step()
    assert 15 * made.scale.item() == pytest.approx(alpha - rate * (2 + decay * alpha), rel=1e-5)


@pytest.mark.parametrize("spec", ["uint8/asym", "int8", "uint4", "fp8_e4m3"])
def test_a_constant_stream_keeps_its_calibrated_range(spec: str) -> None:
    low, high = (0.0, 3.0) if spec == "uint4" else (-3.0, 3.0) if "asym" not in spec else (-1.0, 3.0)
    made = quantizer(spec, "ema", low, high)
    before = made.qparams
    for _ in range(5):
        made.simulate(torch.tensor([[low, 0.5, high]]))
    assert torch.allclose(made.qparams.scale, before.scale, rtol=1e-6)
    if before.zero_point is not None:
        assert torch.equal(made.qparams.zero_point, before.zero_point)


@pytest.mark.parametrize(("rule", "decay"), [("ema", 0.99), ("ema:0.9", 0.9)])
def test_the_step_response_after_n_batches_is_one_minus_a_to_the_n(rule: str, decay: float) -> None:
    made = quantizer("int8", rule, -1.0, 1.0)
    for n in range(1, 30):
        made(torch.tensor([[-2.0, 0.0, 2.0]]))
        assert made.scale.item() * 127 == pytest.approx(1 + (1 - decay**n), rel=1e-5)


def test_consumers_of_one_tensor_count_it_once() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.left(x), torch.relu(self.right(x))], -1)

    net, x = Branches(), torch.randn(16, 6)
    plan = Plan.preset("w8a8", net, x, sites={"*.weight": "int8", "*.input": "int8"})
    plan.ranges["input"], plan.observers["input"] = "ema:0.9", "minmax"
    model = calibrated(net, plan, [x]).train()
    assert model.left.input_quantizer is model.right.input_quantizer
    start = model.left.input_quantizer.scale.item()
    model(3 * x)
    assert model.left.input_quantizer.scale.item() / start == pytest.approx(0.9 + 0.1 * 3, rel=1e-5)


def test_a_range_follows_in_training_only_and_is_frozen_on_request() -> None:
    for made, frozen in ((quantizer("uint8/asym", "ema").eval(), False), (quantizer("uint8/asym", "ema"), True)):
        made.freeze_range = frozen
        before = {name: value.clone() for name, value in made.state_dict().items()}
        assert set(before) == {"scale", "zero_point", "tracker.ends"}
        made(torch.randn(4, 5) * 9)
        assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_batches_without_finite_extremes_move_nothing() -> None:
    made = quantizer("uint8/asym", "ema")
    before = made.scale.clone()
    made(torch.tensor([[1.0, torch.inf]]))
    made(torch.zeros(0, 4))
    assert torch.equal(made.scale, before)


def test_a_quantizer_that_runs_twice_before_the_backward_keeps_both_ranges() -> None:
    made, x = quantizer("uint8/asym", "ema:0.5"), torch.tensor([[-2.0, 5.0]], requires_grad=True)
    (made.simulate(x) + made.simulate(2 * x)).sum().backward()
    assert x.grad is not None


def test_a_followed_range_is_saved_loaded_and_shipped(tmp_path: Path) -> None:
    net, plan, x = net_and_plan({"input": "ema:0.8"})
    model = calibrated(net, plan, [x]).train()
    for _ in range(3):
        model(4 * x)
    scales = [model[0].input_quantizer.scale.clone(), model[2].input_quantizer.scale.clone()]
    assert not any(parameter is model[0].input_quantizer.scale for parameter in model.parameters())
    save(model, tmp_path / "run")
    again = load(tmp_path / "run", copy.deepcopy(net)).train()
    model(x)
    again(x)
    assert torch.equal(model[2].input_quantizer.scale, again[2].input_quantizer.scale)
    assert not torch.equal(model[2].input_quantizer.scale, scales[1])
    model.eval()
    assert torch.equal(convert(model)(x), model(x))


@pytest.mark.parametrize("rule", ["ema", "adarange"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises its own
def test_a_compiled_forward_tracks_like_an_eager_one(rule: str) -> None:
    eager = quantizer("uint8/asym", rule)
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    run = torch.compile(compiled.simulate, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(seed)) * 5
        assert torch.allclose(run(x), eager.simulate(x))
    for name, value in eager.state_dict().items():
        assert torch.allclose(compiled.state_dict()[name], value), name


def _stream(rank: int, step: int) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(100 * step + rank)) * (1 + rank + step)


def _follow(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    made = quantizer("uint8/asym", "ema:0.7")
    for step in range(4):
        made(_stream(rank, step))
    torch.save(made.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_follow_the_extremes_of_both(tmp_path: Path) -> None:
    mp.spawn(_follow, (str(tmp_path),), nprocs=2)
    alone = quantizer("uint8/asym", "ema:0.7")
    for step in range(4):
        alone(torch.cat([_stream(0, step), _stream(1, step)]))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(value, found[name]) for name, value in alone.state_dict().items())


def test_changing_the_bits_starts_again_from_the_same_range() -> None:
    made = quantizer("int8", "ema", -2.0, 2.0)
    made.set_format(QuantSpec.parse("int4").format)
    assert made.tracker.ends.tolist() == pytest.approx([-2.0, 2.0], rel=1e-6)
    assert isinstance(made.qparams, QParams)
