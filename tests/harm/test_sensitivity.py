"""Harm is that of a model with one quantized site; proxies are right where theory says so; files go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.algorithms.pipeline import calibrate
from bitwright.errors import SearchError
from bitwright.flow.prepare import prepare
from bitwright.harm.agreement import agreement, check, ranks, spearman
from bitwright.harm.alone import Weights
from bitwright.harm.fisher import samples_of
from bitwright.harm.sensitivity import Harm, Sensitivity, sensitivity
from bitwright.numerics.affine import simulate
from bitwright.observe.fit import weight_qparams
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site
from bitwright.search.budget import Budget
from bitwright.search.mixed import mixture

FAST = {"weight": "minmax", "input": "minmax"}
WEIGHTS = {"*.weight": ["int2/channel", "int4/channel", "int8/channel"]}
Batch = tuple[Tensor, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()]
    made = nn.Sequential(*layers, nn.Linear(24, 5))
    made(torch.randn(64, 2, 6, 6))  # statistics
    nn.init.uniform_(made[1].weight, 0.5, 2.0)
    return made.eval()


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 2, 6, 6, generator=generator) for _ in range(count)]


def labelled(model: nn.Module) -> list[Batch]:
    return [(x, model(x).argmax(1)) for x in batches()]


def plan_of(model: nn.Module, **options: object) -> Plan:
    sites = {"*.weight": "int4/channel", "*.input": "uint8/asym"}
    return Plan.preset("w8a8", model, batches()[0], sites=sites, observers=FAST, **options)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def first(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0])


@torch.no_grad()
def test_measured_harm_is_that_of_a_model_with_one_quantized_weight() -> None:
    model = net()
    plan, data = plan_of(model), labelled(model)
    found = sensitivity(model, plan, data, {"3.weight": ["int3/channel"]}, method="loss", loss=loss, forward=first)
    alone = plan.with_sites({"*": None, "3.weight": "int3/channel"})
    prepared = prepare(model, alone)
    calibrate(prepared)
    rises = torch.tensor([(loss(prepared.eval(), batch) - loss(model, batch)).item() for batch in data])
    assert found.rows[0].harm == pytest.approx(rises.mean().item(), abs=1e-6)
    assert found.rows[0].error == pytest.approx(rises.std().item() / 3**0.5, abs=1e-6)


@pytest.mark.parametrize("method", ["kl", "sqnr", "fisher"])
def test_fewer_bits_harm_more(method: str) -> None:
    model = net()
    found = sensitivity(model, plan_of(model), batches(), WEIGHTS, method=method)
    assert list(found.sites) == ["0.weight", "3.weight", "6.weight"]
    for site in found.sites:
        harms = [found.table[site, spec].harm for spec in WEIGHTS["*.weight"]]
        assert harms[0] > 4 * harms[1] > 16 * harms[2] > 0
        assert all(found.table[site, spec].error > 0 for spec in WEIGHTS["*.weight"])


def test_kl_is_zero_for_a_weight_that_lies_on_its_grid() -> None:
    model = net()
    spec = {"3.weight": ["int4/channel"]}
    with torch.no_grad():
        weight = model[3].weight
        quant = plan_of(model).sites[Site("3", "weight")]
        assert quant is not None
        weight.copy_(simulate(weight, quant, weight_qparams(weight, quant, "minmax")))
    found = sensitivity(model, plan_of(model), batches(), spec)
    assert abs(found.rows[0].harm) < 1e-9


@torch.no_grad()
def test_an_activation_alone_is_replaced_on_its_way_in() -> None:
    model = net()
    found = sensitivity(model, plan_of(model), batches(), {"3.input": ["uint3/asym", "uint8/asym"]}, method="sqnr")
    high = max(model[:3](x).max().item() for x in batches())
    values = []
    for x in batches():
        hidden, scale = model[:3](x), high / 7
        wanted, seen = model(x), model[3:]((hidden / scale).round().clamp(0, 7) * scale)
        values.append((seen - wanted).square().sum() / wanted.square().sum())
    assert found.table["3.input", "uint3/asym"].harm == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)
    assert found.table["3.input", "uint8/asym"].harm < found.table["3.input", "uint3/asym"].harm / 100


def test_the_change_of_a_folded_weight_is_that_of_its_own_parameter() -> None:
    model = net()
    plan = plan_of(model)
    change = Weights(model, plan, batches(), lambda m, x: m(x)).change(Site("0", "weight"), "int3/channel")
    prepared = prepare(model, plan.with_sites({"*": None, "0.weight": "int3/channel"}))
    calibrate(prepared)
    with torch.no_grad():
        model[0].weight += change
        for x in batches():
            torch.testing.assert_close(model(x), prepared.eval()(x))


def test_fisher_is_the_mean_of_squared_gradients_of_single_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Identity(), nn.Linear(2, 1, bias=False))
    plan = Plan.preset("w8a8", model, torch.zeros(1, 3), sites={"*.weight": "int4/channel"}, observers=FAST)
    data = [(torch.randn(5, 3), torch.randn(5, 1)) for _ in range(2)]
    error = lambda m, batch: F.mse_loss(m(batch[0]), batch[1])  # noqa: E731
    specs = {"0.weight": ["int3/channel"], "2.input": ["int4"]}
    found = sensitivity(model, plan, data, specs, method="fisher", loss=error, forward=first)
    quant = plan.with_sites({"0.weight": "int3/channel"}).sites[Site("0", "weight")]
    assert quant is not None
    weight = model[0].weight.detach()
    change = simulate(weight, quant, weight_qparams(weight, quant, "minmax")) - weight
    values = []
    for x, y in data:
        residual = 2 * (model(x) - y).detach()  # d loss / d output of one sample
        gradient = (residual @ model[2].weight.detach()).unsqueeze(2) * x.unsqueeze(1)  # [n, o, k]
        values.append(0.5 * (gradient.square().mean(0) * change.square()).sum().item())
    assert found.table["0.weight", "int3/channel"].harm == pytest.approx(sum(values) / 2, rel=1e-4)
    hidden = torch.cat([model[0](x).detach() for x, _ in data])
    scale = hidden.abs().max() / 7
    moved = (hidden / scale).round().clamp(-8, 7) * scale - hidden
    gradient = torch.cat([2 * (model(x) - y).detach() @ model[2].weight.detach() for x, y in data])
    expected = 0.5 * (gradient * moved).square().sum(1).mean().item()
    assert found.table["2.input", "int4"].harm == pytest.approx(expected, rel=1e-3)


class Around(nn.Module):
    """A layer whose input is read once more beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.inner(x) + 5 * x


def test_fisher_of_an_activation_leaves_out_what_else_reads_the_tensor() -> None:
    torch.manual_seed(0)
    model, data = Around(), [torch.randn(6, 3) for _ in range(2)]
    plan = Plan.preset("w8a8", model, data[0], observers=FAST)
    error = lambda m, x: m(x).square().mean()  # noqa: E731
    row = sensitivity(model, plan, data, {"inner.input": ["int4"]}, method="fisher", loss=error).rows[0]
    x = model.first(torch.cat(data)).detach()
    scale = x.abs().max() / 7
    moved = (x / scale).round().clamp(-8, 7) * scale - x
    gradient = 2 / 3 * model(torch.cat(data)).detach() @ model.inner.weight.detach()
    assert row.harm == pytest.approx(0.5 * (gradient * moved).square().sum(1).mean().item(), rel=1e-3)


def test_fisher_approximates_small_divergences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4))  # a softmax of one layer: its true Fisher matrix is its Hessian
    plan = Plan.preset("w8a8", model, torch.zeros(1, 16), sites={"*.weight": "int6/channel"}, observers=FAST)
    data = [torch.randn(200, 16) for _ in range(4)]
    found = {
        m: sensitivity(model, plan, data, {"0.weight": ["int6/channel"]}, method=m).rows[0] for m in ("kl", "fisher")
    }
    assert found["fisher"].harm == pytest.approx(found["kl"].harm, rel=0.35)  # off-diagonal terms are left out


def test_the_rounding_of_the_plan_is_the_one_that_is_measured() -> None:
    model = net()
    spec = {"3.weight": ["int2/channel"]}
    nearest = sensitivity(model, plan_of(model), batches(8), spec, method="sqnr")
    swept = sensitivity(model, plan_of(model, steps=["gptq"]), batches(8), spec, method="sqnr")
    assert swept.rows[0].harm < 0.8 * nearest.rows[0].harm


class Inplace(nn.Module):
    """A batch norm that folds, a sum written over the input of a layer, a weight of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        self.a, self.b, self.c, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = self.a(x)
        x.add_(y).relu_()
        return self.out(self.c(self.b(x)))


@pytest.mark.parametrize("steps", [["gptq", "bias_correction"], ["cle", "gptq"]])
def test_the_steps_find_what_they_find_when_the_whole_model_runs(steps: list[str]) -> None:
    torch.manual_seed(0)
    model, data = Inplace().eval(), [torch.randn(24, 6) for _ in range(3)]
    plan = Plan.preset("w4a16", model, data[0], observers=FAST, steps=steps)
    rounded = Weights(model, plan, data, lambda m, x: m(x))
    for path in ("stem", "a", "b"):
        for spec in ("int2/channel", "int4/channel"):
            sites = {"*": None, **dict.fromkeys(("b.weight", "c.weight") if path == "b" else (f"{path}.weight",), spec)}
            whole = prepare(model, plan.with_sites(sites))
            calibrate(whole, data)
            alone = rounded.alone(Site(path, "weight"), spec)
            for x in data:
                torch.testing.assert_close(alone.eval()(x.clone()), whole.eval()(x.clone()), rtol=0, atol=0)


def test_a_file_can_be_saved_read_and_continued(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "harm.json"
    whole = sensitivity(model, plan_of(model), batches(), WEIGHTS)
    seen: list[Harm] = []

    def stop(row: Harm, done: int, total: int) -> None:
        seen.append(row)
        assert (done, total) == (len(seen), 9)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, plan_of(model), batches(), WEIGHTS, work=path, on_row=stop)
    assert len(Sensitivity.load(path).rows) == 3
    again: list[tuple[int, int]] = []
    rest = lambda row, done, total: again.append((done, total))  # noqa: E731
    found = sensitivity(model, plan_of(model), batches(), WEIGHTS, work=path, on_row=rest)
    assert again == [(done, 9) for done in range(4, 10)]
    assert found == whole == Sensitivity.load(path)


def test_a_file_gets_its_folder_and_one_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    found = Sensitivity("kl", "nats", "", "", 2)
    found.save(tmp_path / "new" / "harm.json")
    assert Sensitivity.load(tmp_path / "new" / "harm.json") == found
    with pytest.raises(SearchError, match=r"cannot write the harm file .*name another place for it"):
        found.save(tmp_path / "new" / "harm.json" / "below")


@pytest.mark.parametrize("method", ["kl", "fisher"])
def test_float_is_a_spec_without_harm(method: str, tmp_path: Path) -> None:
    model, work = net(), tmp_path / "harm.json"
    specs = {"3.weight": ["int2/channel", "float"], "6.input": ["float", "uint8/asym"]}
    found = sensitivity(model, plan_of(model), batches(), specs, method=method, work=work)
    assert found.sites == {"3.weight": ["int2/channel", "float"], "6.input": ["float", "uint8/asym"]}
    assert found.table["3.weight", "float"] == Harm("3.weight", "float", 0.0, 0.0)
    assert found.table["3.weight", "int2/channel"].harm > 0
    assert Sensitivity.load(work).table == found.table
    chosen = mixture(model, plan_of(model).with_sites({"3.input": None}), batches()[0][:1], replace(found, rank=1.0))
    assert chosen.allocate(Budget()).sites == {"3.weight": "float", "6.input": "float"}


def test_a_file_of_other_data_is_refused(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "harm.json"
    sensitivity(model, plan_of(model), batches(), {"3.weight": ["int2"]}, work=path)
    with pytest.raises(SearchError, match="has other data"):
        sensitivity(model, plan_of(model), batches()[::-1], {"3.weight": ["int2"]}, work=path)
    with pytest.raises(SearchError, match="has other method: it was kl, now sqnr"):
        sensitivity(model, plan_of(model), batches(), {"3.weight": ["int2"]}, method="sqnr", work=path)
    for text in ("{", "[]", '{"rows": [{}]}', path.read_text().replace('"harm": ', '"harm": NaN, "x": ')):
        path.write_text(text)
        with pytest.raises(SearchError, match="cannot read sensitivity"):
            Sensitivity.load(path)


def test_sites_that_share_a_quantizer_count_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.b(self.a(x).relu()).relu())

    model = Twice()
    plan = Plan.preset("w8a8", model, torch.zeros(1, 8), sites={"*.weight": "int4/channel"}, observers=FAST)
    found = sensitivity(model, plan, [torch.randn(4, 8) for _ in range(2)], {"*.weight": ["int3/channel"]})
    assert list(found.sites) == ["a.weight", "out.weight"]


def test_what_cannot_be_measured() -> None:
    model = net()
    plan, specs = plan_of(model), {"3.weight": ["int2"]}
    with pytest.raises(SearchError, match="method is one of loss, kl, sqnr, fisher, hessian; got 'hope'"):
        sensitivity(model, plan, batches(), specs, method="hope")
    with pytest.raises(SearchError, match="needs loss"):
        sensitivity(model, plan, batches(), specs, method="loss")
    with pytest.raises(SearchError, match="at least 2 batches, got 1"):
        sensitivity(model, plan, batches(1), specs)
    nan = lambda m, b: m(b).sum() * float("nan")  # noqa: E731
    with pytest.raises(SearchError, match=r"3\.weight as int2: the harm is not finite"):
        sensitivity(model, plan, batches(), specs, method="loss", loss=nan)
    with pytest.raises(SearchError, match="found lengths"):
        samples_of((torch.zeros(2, 3), torch.zeros(3)))


def made(method: str, harms: list[float], rank: float | None = None) -> Sensitivity:
    rows = tuple(Harm(f"{i}.weight", "int4", harm, 0.1) for i, harm in enumerate(harms))
    return Sensitivity(method, "", "", "", 2, rows, rank)


def test_spearman_by_hand() -> None:
    assert ranks([5.0, 1.0, 5.0, 9.0]).tolist() == [1.5, 0.0, 1.5, 3.0]
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 1, 1], [3, 2, 1]) == 0.0


def test_proxies_that_do_not_agree_are_refused() -> None:
    truth = made("loss", [1.0, 2, 3, 4, 5, 6, 7, 8])
    check(truth)
    good = agreement(made("fisher", [1.0, 3, 2, 4, 5, 6, 8, 7]), truth)
    assert good.rank == pytest.approx(1 - 6 * 4 / (8 * 63))
    check(good)
    floats = tuple(Harm(f"{i}.weight", "float", 0.0, 0.0) for i in range(8))
    assert agreement(replace(good, rows=good.rows + floats), replace(truth, rows=truth.rows + floats)).rank == good.rank
    bad = agreement(made("fisher", [8.0, 7, 6, 5, 1, 2, 3, 4]), truth)
    with pytest.raises(SearchError, match=r"below 0\.6; measure the harm instead"):
        check(bad)
    check(bad, least=-1.0)
    with pytest.raises(SearchError, match="fisher is a proxy; compare it"):
        check(made("fisher", [1.0]))
    with pytest.raises(SearchError, match="1 rows in common; 8 are needed"):
        agreement(made("fisher", [1.0]), truth)
    with pytest.raises(SearchError, match="got 'fisher'"):
        agreement(good, good)
