"""Sensitivity -> cost -> allocation -> plan, end to end: bytes come out as promised, and harm is what was spent on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.bench.measure import model_bytes
from bitwright.costs.cost import plan_bytes
from bitwright.errors import SearchError
from bitwright.harm.sensitivity import Harm, Sensitivity
from bitwright.search.bits import output_error
from bitwright.search.mixed import mixture, with_allocation

FAST = {"weight": "minmax", "input": "minmax"}
SPECS = [f"int{bits}/channel" for bits in (2, 3, 4, 6, 8)]


class Net(nn.Module):
    """A folded batch norm, a residual add, a tied weight, an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.deep = (
            nn.Conv1d(3, 8, 3, padding=1),
            nn.BatchNorm1d(8),
            nn.Conv1d(8, 8, 3, padding=1),
        )
        self.one, self.two, self.lstm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LSTM(8, 8)
        self.two.weight = self.one.weight
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.deep(x) + x).relu().transpose(1, 2)
        return self.out(self.lstm(self.two(self.one(x).relu()))[0].mean(1))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 5, generator=generator) for _ in range(3)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def plan_of(model: nn.Module, weight: str = "int4/channel") -> bw.Plan:
    sites = {"*weight*": weight, "out.weight": "int8/channel", "out.input": "uint8/asym"}
    return bw.Plan.preset("w8a8", model, batches()[0], sites=sites, observers=FAST)


def shipped(model: nn.Module, plan: bw.Plan) -> nn.Module:
    prepared = bw.prepare(model, plan)
    bw.calibrate(prepared, batches())
    return bw.convert(prepared)


def test_a_mixed_model_stores_what_was_promised_and_does_less_harm() -> None:
    model = net()
    plan = plan_of(model, "int3/channel")
    found = bw.sensitivity(model, plan, batches(), {"[!o]*weight*": SPECS})
    limit = plan_bytes(model, plan)
    chosen = bw.mixture(model, plan, batches()[0][:1], found).allocate(bw.Budget(bytes=limit))
    mixed = bw.with_allocation(plan, chosen, "a test")
    assert chosen.sites["one.weight"] == chosen.sites["two.weight"]
    assert len(set(chosen.sites.values())) > 1
    assert model_bytes(shipped(model, mixed)) == chosen.cost.bytes <= limit
    assert output_error(model, shipped(model, mixed), batches()) < output_error(model, shipped(model, plan), batches())
    assert mixed.why[next(iter(mixed.sites))] == "a test"
    assert bw.Plan.from_toml(mixed.to_toml()).sites == mixed.sites


@pytest.mark.parametrize("seed", range(6))
def test_bytes_of_any_allocation_are_those_of_the_shipped_model(seed: int) -> None:
    model = net()
    plan, generator = plan_of(model), torch.Generator().manual_seed(seed)
    specs = [*SPECS, "ternary/channel", "int5"] if seed % 2 else SPECS
    sites = [site for site in plan.sites if site.is_weight and site.path != "out" and site not in plan.shared]
    draw = lambda: torch.rand((), generator=generator).item()  # noqa: E731
    rows = [Harm(str(site), text, draw(), 0.0) for site in sites for text in specs]
    rows += [Harm("deep.input", text, draw(), 0.0) for text in ("uint8/asym", "uint4", "uint6/asym")]
    made = mixture(model, plan, batches()[0][:1], Sensitivity("kl", "nats", "", "", 2, tuple(rows)))
    chosen = made.allocate(bw.Budget())
    assert plan_bytes(model, with_allocation(plan, chosen)) == chosen.cost.bytes


def test_pairs_of_weight_and_activation_bits_multiply() -> None:
    model = net()
    plan = plan_of(model)
    rows = [Harm("deep.weight", f"int{b}/channel", 1 / b, 0.0) for b in (2, 4)]
    rows += [Harm("deep.input", f"uint{b}/asym", 1 / b, 0.0) for b in (4, 8)]
    made = mixture(model, plan, batches()[0][:1], Sensitivity("kl", "nats", "", "", 2, tuple(rows)))
    deep = next(layer for layer in made.layers if "deep.weight" in layer.sites)
    assert {choice.specs: choice.cost.bops for choice in deep.choices}.keys() == {
        (f"int{w}/channel", f"uint{a}/asym") for w in (2, 4) for a in (4, 8)
    }
    macs = 8 * 5 * 8 * 3
    assert [choice.cost.bops for choice in deep.choices] == [macs * 8, macs * 16, macs * 16, macs * 32]
    assert [choice.harm for choice in deep.choices] == pytest.approx([0.75, 0.625, 0.5, 0.375])
    everything = made.allocate(bw.Budget(bops=made.fixed.bops + macs * 16))
    assert everything.sites["deep.weight"] == "int4/channel"
    assert everything.sites["deep.input"] == "uint4/asym"


def test_combinations_without_a_kernel_are_left_out() -> None:
    model, plan = net(), plan_of(net())
    rows = tuple(Harm("deep.weight", text, 0.1, 0.0) for text in ("nf4/channel", "int4/channel"))
    made = mixture(model, plan, batches()[0], Sensitivity("kl", "", "", "", 2, rows))
    assert [choice.specs for choice in made.layers[0].choices] == [("int4/channel",)]
    with pytest.raises(SearchError, match="deep: target cpu can run none"):
        mixture(model, plan, batches()[0], Sensitivity("kl", "", "", "", 2, rows[:1]))


def test_negative_harm_is_noise() -> None:
    model = net()
    rows = (Harm("deep.weight", "int2/channel", -0.5, 1.0), Harm("deep.weight", "int4/channel", 0.1, 1.0))
    made = mixture(model, plan_of(model), batches()[0], Sensitivity("loss", "", "", "", 2, rows))
    assert [choice.harm for choice in made.layers[0].choices] == [0.0, 0.1]


def test_what_does_not_fit_is_refused() -> None:
    model = net()
    plan = plan_of(model)
    row = (Harm("deep.weight", "int2/channel", 0.5, 1.0),)
    with pytest.raises(SearchError, match="fisher is a proxy"):
        mixture(model, plan, batches()[0], Sensitivity("fisher", "", "", "", 2, row))
    with pytest.raises(SearchError, match=r"shallow\.weight is no site"):
        mixture(
            model, plan, batches()[0], Sensitivity("kl", "", "", "", 2, (Harm("shallow.weight", "int2", 0.1, 0.0),))
        )
    made = mixture(model, plan, batches()[0], Sensitivity("kl", "", "", "", 2, row))
    least = plan_bytes(model, plan.with_sites({"deep.weight": "int2/channel"}))
    with pytest.raises(SearchError, match=f"the smallest that any choice reaches is bytes {least}"):
        made.allocate(bw.Budget(bytes=least - 1))
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    plan, chosen = bw.Plan.preset("w8a8", other, torch.zeros(1, 4)), made.allocate(bw.Budget())
    with pytest.raises(SearchError, match=r"deep\.weight is no site"):
        with_allocation(plan, chosen)
