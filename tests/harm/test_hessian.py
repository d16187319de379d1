"""Curvature is that of torch.linalg where the Hessian is known; Omega is its definition; models stay as they were."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import SearchError
from bitwright.harm.agreement import agreement, check
from bitwright.harm.hessian import top_eigenvalues, traces
from bitwright.harm.hessian_products import differentiable_twice, gradients, own_answers, products
from bitwright.harm.sensitivity import harm_of_whole, sensitivity
from bitwright.numerics.affine import simulate
from bitwright.observe.fit import weight_qparams
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site

SEEDS = range(3)


class Quadratic(nn.Module):
    """``1/2 w' A w`` over two parameters, whatever the input."""

    def __init__(self, a: Tensor, cut: int) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.one, self.two = nn.Parameter(torch.randn(cut)), nn.Parameter(torch.randn(len(a) - cut, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat([self.one, self.two[:, 0]])
        return (0.5 * (w @ self.a @ w)).expand(len(x))


def symmetric(values: list[float], seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return (q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T).float()


def mean(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).mean()


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


NOTHING = [torch.zeros(4), torch.zeros(4)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_top_eigenvalue_of_a_quadratic_is_that_of_linalg(seed: int) -> None:
    for values in ([9.0, 6, 5, 3, 1, -2, 0.1], [-9.0, 6, 5, 3, 1, -2, 0.1]):
        a = symmetric(values, seed)
        model = Quadratic(a, 3)
        found = top_eigenvalues(model, NOTHING, ["one", "two"], whole=True, loss=mean, seed=seed)[""]
        assert found.value == pytest.approx(values[0], rel=1e-3)
        assert found.converged
        assert found.iterations < 100
        assert found.residual < 0.5
        parts = top_eigenvalues(model, NOTHING, ["one", "two"], loss=mean, tolerance=1e-6, most=1000, seed=seed)
        for name, block in (("one", a[:3, :3]), ("two", a[3:, 3:])):
            exact = torch.linalg.eigvalsh(block.double())
            assert parts[name].value == pytest.approx(exact[exact.abs().argmax()].item(), rel=1e-3)


def test_power_iteration_says_when_it_did_not_converge() -> None:
    model = Quadratic(symmetric([4.0, -4.0, 1.0]), 1)  # two eigenvalues of one size: v turns for ever
    found = top_eigenvalues(model, NOTHING, ["one", "two"], whole=True, loss=mean, most=7)[""]
    assert (found.converged, found.iterations) == (False, 7)
    assert found.residual > 0.1
    flat = top_eigenvalues(Quadratic(torch.zeros(3, 3), 1), NOTHING, ["two"], loss=mean)["two"]
    assert (flat.value, flat.converged, flat.iterations) == (0.0, True, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_traces_of_a_quadratic_are_within_four_standard_errors(seed: int) -> None:
    a = symmetric([9.0, 6, 5, 3, 1, 2, 0.1, 4], seed)
    found = traces(Quadratic(a, 3), NOTHING, ["one", "two"], loss=mean, fewest=50, most=50, seed=seed)
    for trace, block in ((found.layers["one"], a[:3, :3]), (found.layers["two"], a[3:, 3:]), (found.whole, a)):
        assert 0 < trace.error < 2
        assert abs(trace.value - block.trace().item()) < 4 * trace.error
        assert trace.elements == len(block)
    assert sum(trace.value for trace in found.layers.values()) == pytest.approx(found.whole.value, rel=1e-12)


def test_the_spread_of_draws_is_that_of_theory() -> None:
    a = symmetric([9.0, 6, 5, 3, 1, -2, 0.1, 4])
    model = Quadratic(a, 4)
    found = traces(model, NOTHING[:1], ["one", "two"], loss=mean, fewest=800, most=800).whole
    expected = 2 * (a.square().sum() - a.diagonal().square().sum()).item()
    assert found.error**2 * found.draws == pytest.approx(expected, rel=0.25)
    halved = traces(model, NOTHING, ["one", "two"], loss=mean, fewest=800, most=800).whole  # two batches, other signs
    assert halved.error**2 * halved.draws == pytest.approx(expected / 2, rel=0.25)


def test_draws_go_on_until_the_standard_error_is_small() -> None:
    a = symmetric([9.0, 6, 5, 3, 1, 2, 0.1, 4])
    a[:4, :4] *= 1e-4  # a layer too small to matter
    a[:4, 4:] = a[4:, :4] = 0
    model = Quadratic(a, 4)
    loose, tight = (traces(model, NOTHING, ["one", "two"], loss=mean, precision=p) for p in (0.2, 0.03))
    assert loose.whole.draws < tight.whole.draws < 200
    assert loose.whole.draws % 6 == 0
    assert tight.layers["two"].error <= 0.03 * tight.layers["two"].value
    assert tight.layers["one"].error <= 0.03 * 0.01 * tight.whole.value
    at_most = traces(model, NOTHING, ["one", "two"], loss=mean, precision=1e-9, most=25).whole
    assert at_most.draws == 25
    assert at_most.error > 0
    with pytest.raises(SearchError, match="at least 2 draws, got fewest=1"):
        traces(model, NOTHING, ["one"], loss=mean, fewest=1)


def test_the_hessian_of_linear_regression() -> None:
    x, y = torch.randn(40, 6), torch.randn(40, 1)
    model = nn.Linear(6, 1, bias=False)
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]  # a mean over items: the second counts three times the first
    h = 2 * x.T @ x / 40
    found = torch.zeros(6, 6)
    with differentiable_twice(model, [model.weight]):
        for share, batch in zip((0.25, 0.75), batches, strict=True):
            variables, gradient = gradients(lambda loss, b: (loss(model, b), {"w": model.weight}), squared, batch)
            for i in range(6):
                unit = torch.eye(6)[i : i + 1]
                found[i] += share * products(variables, gradient, {"w": unit})["w"][0].float()
    torch.testing.assert_close(found, h)
    exact = torch.linalg.eigvalsh(h)[-1].item()
    value = top_eigenvalues(model, batches, loss=squared, tolerance=1e-5)["weight"].value
    assert value == pytest.approx(exact, rel=1e-3)
    trace = traces(model, batches, loss=squared).layers["weight"]
    assert abs(trace.value - h.trace().item()) < 4 * trace.error


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))).mean(1)


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    made = nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(12, 4))
    made(torch.randn(32, 1, 6, 6))
    return made


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


MODELS = {
    "relu": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), (5,)),
    "convolutions": (convolutional, (1, 6, 6)),
    "attention": (Attending, (4, 8)),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(32, 3)),
        (4, 8),
    ),
    "recurrent": (Recurrent, (6, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_finite_differences_and_models_stay_what_they_were(name: str) -> None:
    make, shape = MODELS[name]
    model: nn.Module = make().train()
    first = next(model.parameters()).requires_grad_(False)
    first.grad = torch.ones_like(first)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = torch.randn(16, *shape), torch.randint(0, 3, (16,))
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    weights = {key: w for key, w in model.named_parameters() if w.dim() > 1}
    direction = {key: torch.randn_like(w) for key, w in weights.items()}
    found = traces(model, [batch], loss=loss, fewest=2, most=2)
    assert set(found.layers) == set(weights)
    assert all(math.isfinite(trace.value) for trace in found.layers.values())
    with differentiable_twice(model, weights.values()):
        hv = products(*gradients(lambda f, b: (f(model, b), dict(weights)), loss, batch), direction)
    assert all(module.training for module in model.modules())
    assert first.grad.eq(1).all()
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert all(p.grad is None for p in list(model.parameters())[1:])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    expected = _differences(model.eval(), weights, direction, loss, batch)
    for key in weights:
        torch.testing.assert_close(hv[key], expected[key], rtol=1e-3, atol=1e-5)


def _differences(model: nn.Module, weights: Any, direction: Any, loss: Any, batch: Any) -> dict[str, Tensor]:
    """``(g(w + e v) - g(w - e v)) / 2e`` in float64."""
    ends, step = [], 1e-6
    for sign in (1, -1):
        double = copy.deepcopy(model).double()
        moved = [double.get_parameter(key) for key in weights]
        with torch.no_grad():
            for key, weight in zip(weights, moved, strict=True):
                weight.requires_grad_(True).add_(sign * step * direction[key])
        ends.append(torch.autograd.grad(loss(double, (batch[0].double(), batch[1])), moved))
    return {key: (a - b) / (2 * step) for key, a, b in zip(weights, *ends, strict=True)}


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).eval()


def entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def first(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0])


def exact(model: nn.Module, name: str, loss: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
    """The block of the Hessian, element by element."""
    weight = model.get_parameter(name)
    run = lambda f, b: (f(model, b), {"w": weight})  # noqa: E731
    with differentiable_twice(model, [weight]):
        variables, gradient = gradients(run, loss, batch)
        units = torch.eye(weight.numel()).view(-1, *weight.shape)
        return torch.stack([products(variables, gradient, {"w": unit})["w"].flatten() for unit in units])


def test_the_models_own_answers_have_the_fisher_matrix_as_their_hessian() -> None:
    model, x = classifier(), torch.randn(20, 5)
    weight = model.get_parameter("2.weight")
    fisher = torch.zeros(24, 24)
    for item in x:
        log = F.log_softmax(model(item), -1)
        for k in range(4):
            g = torch.autograd.grad(log[k], weight, retain_graph=True)[0].flatten()
            fisher += log[k].exp().detach() * torch.outer(g, g) / len(x)
    torch.testing.assert_close(exact(model, "2.weight", own_answers(first), (x, None)).float(), fisher)


def test_draws_with_outputs_have_the_same_mean_and_less_noise() -> None:
    torch.manual_seed(3)
    layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Linear(8, 4)), torch.randn(40, 8)
    y = x[:, :4].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        entropy(model, (x, y)).backward()
        optimizer.step()
    batches = list(zip(x.split(20), y.split(20), strict=True))
    stop = {"fewest": 40, "most": 40}
    plain = traces(model, batches, loss=entropy, **stop)
    quiet = traces(model, batches, loss=entropy, forward=first, **stop)
    own = traces(model, batches, forward=first, **stop)
    for name in ("0.weight", "6.weight"):
        truth = exact(model, name, entropy, (x, y)).trace().item()
        fisher = exact(model, name, own_answers(first), (x, y)).trace().item()
        for found, value in ((plain, truth), (quiet, truth), (own, fisher)):
            assert abs(found.layers[name].value - value) < 4 * found.layers[name].error
        assert quiet.layers[name].error < 0.7 * plain.layers[name].error


WEIGHTS = {"*.weight": ["int2/channel", "int4/channel", "int8/channel"]}
FAST = {"weight": "minmax", "input": "minmax"}


def plan_of(model: nn.Module, example: Tensor, **options: Any) -> Plan:
    sites = {"*.weight": "int4/channel", "*.input": "uint8/asym"}
    return Plan.preset("w8a8", model, example, sites=sites, observers=FAST, **options)


def labelled(model: nn.Module, *shape: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    inputs = [torch.randn(6, *shape) for _ in range(count)]
    return [(x, torch.distributions.Categorical(logits=model(x).detach()).sample()) for x in inputs]


@pytest.mark.parametrize("steps", [[], ["gptq"]])
@pytest.mark.parametrize("loss", [None, entropy])
def test_omega_falls_with_the_bits_as_the_steps_do(steps: list[str], loss: Any) -> None:
    model = convolutional().eval()
    data = labelled(model, 1, 6, 6)
    plan = plan_of(model, data[0][0], steps=steps)
    found = sensitivity(model, plan, data, WEIGHTS, method="hessian", loss=loss, forward=first)
    assert (found.method, found.unit) == ("hessian", "of the loss")
    assert list(found.sites) == ["0.weight", "6.weight"]
    for site in found.sites:
        two, four, eight = (found.table[site, spec].harm for spec in WEIGHTS["*.weight"])
        assert two > four > eight > 0
        assert found.table[site, "int4/channel"].error > 0
        if not steps:
            assert four / eight == pytest.approx((127 / 7) ** 2, rel=0.6)


def test_omega_of_a_large_layer_has_the_ratio_of_squared_steps() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    data = labelled(model, 64, count=2)
    found = sensitivity(model, plan_of(model, data[0][0]), data, WEIGHTS, method="hessian", forward=first)
    for site in found.sites:
        ratio = found.table[site, "int4/channel"].harm / found.table[site, "int8/channel"].harm
        assert ratio == pytest.approx((127 / 7) ** 2, rel=0.15)


def test_omega_is_its_definition_for_weights_and_activations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Identity(), nn.Linear(2, 1, bias=False))
    plan = plan_of(model, torch.zeros(1, 3))
    data = [(torch.randn(5, 3), torch.randn(5, 1)) for _ in range(3)]
    specs = {"0.weight": ["int3/channel"], "2.input": ["int4"]}
    found = sensitivity(model, plan, data, specs, method="hessian", loss=squared, forward=first)
    quant = plan.with_sites({"0.weight": "int3/channel"}).sites[Site("0", "weight")]
    assert quant is not None
    first_weight, second = model[0].weight.detach(), model[2].weight.detach()
    change = simulate(first_weight, quant, weight_qparams(first_weight, quant, "minmax")) - first_weight
    hidden = [x @ first_weight.T for x, _ in data]
    scale = torch.cat(hidden).abs().max() / 7
    weights, activations = [], []
    for (x, _), h in zip(data, hidden, strict=True):
        trace = 2 * second.square().sum() * x.square().sum() / 5  # loss (second W x - y)^2: 2 |second|^2 |x|^2
        weights.append(0.5 * trace / 6 * change.square().sum())
        error = (h / scale).round().clamp(-8, 7) * scale - h
        activations.append(0.5 * (2 * second.square().sum()) / 2 * error.square().sum(1).mean())
    row = found.table["0.weight", "int3/channel"]
    assert row.harm == pytest.approx(torch.stack(weights).mean().item(), rel=0.5)
    row = found.table["2.input", "int4"]
    assert row.harm == pytest.approx(torch.stack(activations).mean().item(), rel=0.5)


def test_the_trace_is_that_of_the_folded_weight() -> None:
    """What is quantized is ``W f``; a factor that makes W ten times larger and f ten times smaller changes nothing."""
    model = convolutional().eval()
    data, spec = labelled(model, 1, 6, 6), {"0.weight": ["int4/channel"]}
    before = sensitivity(model, plan_of(model, data[0][0]), data, spec, method="hessian", forward=first).rows[0]
    with torch.no_grad():
        factors = torch.tensor([10.0, 0.1, 2.0])
        model[0].weight *= factors.view(-1, 1, 1, 1)
        model[1].running_mean *= factors
        model[1].running_var.add_(model[1].eps).mul_(factors.square()).sub_(model[1].eps)
    after = sensitivity(model, plan_of(model, data[0][0]), data, spec, method="hessian", forward=first).rows[0]
    assert after.harm == pytest.approx(before.harm, rel=1e-3)
    assert after.error == pytest.approx(before.error, rel=1e-3)


def test_an_activation_of_several_readers_is_shifted_for_all_that_share_it_and_for_nobody_else() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return self.a(h) + self.b(h) + 100 * h[:, :2]  # the last term is no site

    torch.manual_seed(0)
    model, data = Forked(), [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(2)]
    loss = lambda m, b: (m(b[0]) - b[1]).square().sum(1).mean()  # noqa: E731
    plan = plan_of(model, data[0][0])
    found = sensitivity(model, plan, data, {"a.input": ["int8"]}, method="hessian", loss=loss, forward=first)
    both = (model.a.weight + model.b.weight).detach()
    h = torch.cat([model.stem(x).detach() for x, _ in data])
    scale = h.abs().max() / 127
    error = (h / scale).round() * scale - h
    expected = 0.5 * 2 * both.square().sum() / 4 * error.square().sum(1).mean()
    assert found.rows[0].harm == pytest.approx(expected.item(), rel=0.5)


def test_hessian_harm_is_a_proxy_that_agrees() -> None:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 5))
    data = labelled(model, 16)
    plan = plan_of(model, data[0][0])
    proxy, truth = (sensitivity(model, plan, data, WEIGHTS, method=m, forward=first) for m in ("hessian", "kl"))
    with pytest.raises(SearchError, match="hessian is a proxy"):
        check(proxy)
    compared = agreement(proxy, truth)
    assert compared.rank is not None
    assert compared.rank > 0.9
    check(compared)
    with pytest.raises(SearchError, match="hessian is no harm of a whole model"):
        harm_of_whole(model, data, "hessian")


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(self.layer(x))  # type: ignore[no-any-return]


def test_what_has_no_second_derivative_is_named() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(SearchError, match="no second derivative: Cube is marked once_differentiable"):
        traces(Custom(), [x], loss=mean)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x).view(1, 1, -1, 3)
            return fused(y, y, y)[0].view(-1, 3)

    with pytest.raises(SearchError, match=r"no second derivative: .*flash_attention_for_cpu_backward"):
        traces(Fused(), [x], loss=lambda m, b: m(b).square().sum())


def test_what_cannot_be_measured() -> None:
    model, x = classifier(), torch.randn(4, 5)
    nan = lambda m, b: m(b).mean() * float("nan")  # noqa: E731
    with pytest.raises(SearchError, match="the loss of a batch is nan"):
        traces(model, [x], loss=nan)
    with pytest.raises(SearchError, match="the loss of a batch is nan"):
        sensitivity(model, plan_of(model, x), [x, x], WEIGHTS, method="hessian", loss=nan)
    with pytest.raises(SearchError, match="one finite number"):
        traces(model, [x], loss=lambda m, b: m(b))
    with pytest.raises(SearchError, match=r"depends on none of 0\.weight"):
        traces(model, [x], ["0.weight"], loss=lambda m, b: b.mean())
    with pytest.raises(SearchError, match=r"does not depend on 2\.weight on any batch"):
        traces(model, [x], loss=lambda m, b: m[0](b).square().mean())
    with pytest.raises(SearchError, match=r"does not depend on 2\.weight on any batch"):
        top_eigenvalues(model, [x], loss=lambda m, b: m[0](b).square().mean())
    with pytest.raises(SearchError, match=r"curvature of the loss at 0\.weight is not finite"):
        traces(
            model, [x], loss=lambda m, b: (m(b).mean() - m(b).mean().detach()).abs().sqrt().nan_to_num() + m(b).mean()
        )
    with pytest.raises(SearchError, match=r"'0\.wait' matches none of the 4 parameters; near names: 0\.weight"):
        traces(model, [x], ["0.wait"], loss=mean)
    with pytest.raises(SearchError, match="got no batches"):
        traces(model, [], loss=mean)
    with pytest.raises(SearchError, match=r"call model\.float"):
        traces(classifier().half(), [x], loss=mean)
    with pytest.raises(SearchError, match="no parameter with two axes"):
        traces(nn.BatchNorm1d(5), [x], loss=mean)


def test_the_same_seed_gives_the_same_numbers() -> None:
    model = classifier()
    data = labelled(model, 5, count=2)
    one, same, other = (traces(model, data, loss=entropy, forward=first, most=6, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    one, same, other = (top_eigenvalues(model, data, loss=entropy, most=5, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    found = [
        sensitivity(model, plan_of(model, data[0][0]), data, WEIGHTS, method="hessian", forward=first) for _ in "ab"
    ]
    assert found[0] == found[1]
