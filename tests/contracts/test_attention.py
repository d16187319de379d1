"""Contracts C1 to C3 for attention: trained equals shipped, bit for bit where its products are of integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.flow.checkpoint import load, save
from bitwright.flow.convert import convert
from bitwright.flow.coverage import coverage
from bitwright.graph.calls import Attention, Cat, MatMul
from bitwright.nn.layer import Simulated
from bitwright.plan.plan import Plan
from nets import calibrated, one_thread, trained, unequal_kernels  # noqa: F401

ON = {"*attention_0.*": "uint8/asym"}  # the products of attention, which presets leave in float


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]


class CrossAttention(nn.Module):
    """Other sizes for keys and values, and the weights among the results."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.attn = nn.Linear(12, 10), nn.MultiheadAttention(12, 2, kdim=10, vdim=5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory(x)
        out, weights = self.attn(x, memory, memory[..., :5])
        return torch.cat([out, weights], -1)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "biases in the sequence": {"add_bias_kv": True, "add_zero_attn": True},
}
SPECS = {
    "w8a8": ("w8a8", {}),
    "all integers": ("w8a8", ON),
    "w4a8, signed operands": ("w4a8", {**ON, "*attention_0.query": "int8", "*attention_0.key": "int4"}),
    "dynamic": ("w8a8-dynamic", {"*attention_0.*": "uint8/asym/dynamic"}),
    "one scale per tensor": ("w8a8", {"*proj*weight": "int8"}),
}


@pytest.mark.parametrize("specs", SPECS)
@pytest.mark.parametrize("options", OPTIONS)
def test_trained_attention_equals_shipped(options: str, specs: str) -> None:
    net, x = SelfAttention(**OPTIONS[options]), torch.randn(4, 6, 12)
    name, rules = SPECS[specs]
    simulated = trained(calibrated(net, Plan.preset(name, net, x, sites=rules), [x]), [x])
    assert unequal_kernels(simulated, [x, 3 * x, torch.zeros_like(x), x[:1]]) == []


@pytest.mark.parametrize("rules", [{}, ON, {"attn.query": "uint4/asym"}], ids=str)
def test_trained_cross_attention_equals_shipped(rules: dict[str, str]) -> None:
    net, x = CrossAttention(), torch.randn(4, 6, 12)
    simulated = trained(calibrated(net, Plan.preset("w8a8", net, x, sites=rules), [x]), [x])
    assert unequal_kernels(simulated, [x, 3 * x]) == []


@pytest.mark.parametrize("mask", ["boolean", "numbers", "per head"])
def test_masks(mask: str) -> None:
    net, x = SelfAttention(batch_first=True).eval(), torch.randn(4, 6, 12)
    wall = torch.ones(6, 6, dtype=torch.bool).triu(1)
    if mask == "numbers":
        wall = torch.zeros(6, 6).masked_fill(wall, -torch.inf)
    if mask == "per head":
        wall = wall.expand(12, 6, 6)
    simulated = calibrated(net, Plan.preset("w8a8", net, (x, wall), sites=ON), [(x, wall)])
    with torch.no_grad():
        expected, found = net(x, wall), simulated(x, wall)
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
        assert not torch.equal(found, simulated(x))
        assert torch.equal(convert(simulated)(x, wall), found)


def test_weights_of_every_kind_come_out() -> None:
    x, padding = torch.randn(3, 5, 12), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    attn = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    batch = {"query": x, "key": x, "value": x, "key_padding_mask": padding}
    simulated = calibrated(attn, Plan.preset("w8a8", attn, batch, sites=ON), [batch])
    shipped = convert(simulated)
    for average in (True, False):
        with torch.no_grad():
            wanted = attn(**batch, average_attn_weights=average)
            found = simulated(**batch, average_attn_weights=average)
            assert found[1].shape == wanted[1].shape
            assert (found[1] - wanted[1]).abs().max() < 0.02
            again = shipped(**batch, average_attn_weights=average)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    one = {key: value[0] for key, value in batch.items()}
    with torch.no_grad():
        assert torch.equal(simulated(**one)[0], simulated(**{k: v[:1] for k, v in batch.items()})[0][0])
        assert simulated(**one)[1].shape == attn(**one)[1].shape


def test_prepared_attention_computes_what_it_computed_before() -> None:
    from bitwright.flow.prepare import prepare

    for options in OPTIONS.values():
        net, x = SelfAttention(**options).eval(), torch.randn(4, 6, 12)
        with torch.no_grad():
            assert torch.allclose(prepare(net, Plan.preset("w8a8", net, x, sites=ON))(x), net(x), atol=1e-6)


def test_a_query_that_may_look_nowhere_gets_zeros_and_finite_gradients() -> None:
    x, wall = torch.randn(1, 2, 3, 4, requires_grad=True), torch.tensor([[False] * 3, [True] * 3, [True] * 3])
    for need_weights in (False, True):
        out = Attention()(x, x, x, wall, need_weights=need_weights)
        out = out[0] if need_weights else out
        assert out[0, 0, 0].tolist() == [0.0] * 4
        [grad] = torch.autograd.grad(out.sum(), x)
        assert grad.isfinite().all()


def test_probabilities_have_the_range_that_is_known() -> None:
    net, x = SelfAttention(), torch.randn(4, 6, 12)
    for spec, scale, zero_point in (
        ("uint8", 1 / 255, None),
        ("uint4/asym", 1 / 15, 0.0),
        ("int8/asym", 1 / 255, -128),
    ):
        plan = Plan.preset("w8a8", net, x, sites={**ON, "*.probs": spec})
        assert plan.range_rule(next(site for site in plan.sites if site.slot == "probs")) == "fixed"
        probs = trained(calibrated(net, plan, [x]), [x]).attn.attention_0.probs_quantizer
        assert probs.qparams.scale.item() == pytest.approx(scale)
        assert zero_point is None or probs.zero_point.item() == zero_point


def test_dropout_works_in_training_only() -> None:
    net, x = SelfAttention(dropout=0.5), torch.randn(4, 6, 12)
    simulated = calibrated(net, Plan.preset("w8a8", net, x, sites=ON), [x])
    assert torch.equal(simulated(x), simulated(x))
    simulated.train()
    assert not torch.equal(simulated(x), simulated(x))


def test_the_same_tensor_has_one_quantizer_and_others_their_own() -> None:
    x = torch.randn(4, 6, 12)
    own = calibrated(SelfAttention(), "w8a8", [x]).attn
    assert own.query_quantizer is own.key_quantizer is own.value_quantizer
    cross = calibrated(CrossAttention(), "w8a8", [x]).attn
    assert len({id(cross.query_quantizer), id(cross.key_quantizer), id(cross.value_quantizer)}) == 3


def test_sums_of_many_values_stay_exact() -> None:
    net, x = SelfAttention(batch_first=True), torch.randn(1, 700, 12)  # 700 products of 255 * 255 exceed 2**24
    simulated = trained(calibrated(net, Plan.preset("w8a8", net, x, sites=ON), [x]), [x], steps=2)
    assert unequal_kernels(simulated, [x]) == []


# --- layers of transformers ---------------------------------------------------------------------------------------


def calls(model: nn.Module) -> set[str]:
    """Collects the paths of simulated modules that run; not by hooks: torch leaves its fused path where it sees one."""
    ran: set[str] = set()

    def noting(path: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            ran.add(path)
            return forward(*args, **kwargs)

        return run

    for path, module in model.named_modules():
        if isinstance(module, Simulated):
            module.forward = noting(path, module.forward)  # type: ignore[method-assign]
    return ran


STACKS = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(12, 2, 16, batch_first=True),
    "gelu, norm first": lambda: nn.TransformerEncoderLayer(
        12, 2, 16, activation="gelu", batch_first=True, norm_first=True
    ),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 2),
}


@pytest.mark.filterwarnings("ignore:.*nested tensor")
@pytest.mark.parametrize(
    "rules", [{}, ON, {"*self_attn.in_proj_weight": "float", "*self_attn.[qkv]*": "float"}], ids=str
)
@pytest.mark.parametrize("name", STACKS)
def test_nothing_bypasses_the_quantizers_of_an_encoder(name: str, rules: dict[str, str]) -> None:
    net, x = STACKS[name](), torch.randn(3, 5, 12)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    plan = Plan.preset("w8a8", net, x, sites=rules)
    simulated = calibrated(net, plan, [x])
    paths = {path for path, module in simulated.named_modules() if isinstance(module, Simulated)}
    assert paths >= {site.path for site, spec in plan.sites.items() if spec is not None}
    mask = "mask" if isinstance(net, nn.TransformerEncoder) else "src_mask"
    for training in (False, True):
        for batch in ({}, {"src_key_padding_mask": padding}, {mask: torch.zeros(5, 5)}):
            twin = calibrated(net, plan, [x]).train(training)
            ran = calls(twin)
            with torch.no_grad():
                twin(x, **batch)
            assert ran == paths, (training, list(batch))
    simulated = trained(simulated, [x])
    shipped = convert(simulated)
    with torch.no_grad():
        assert torch.equal(shipped(x), simulated(x))
        assert torch.equal(shipped(x, src_key_padding_mask=padding), simulated(x, src_key_padding_mask=padding))


def test_a_decoder_layer_ships_what_was_trained() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(12, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.layer(x, x[:, :3], tgt_mask=mask, tgt_is_causal=True)

    net, x = Decoder(), torch.randn(3, 5, 12)
    simulated = trained(calibrated(net, Plan.preset("w8a8", net, x, sites=ON), [x]), [x])
    assert unequal_kernels(simulated, [x, 3 * x]) == []


def test_attention_that_a_plan_leaves_alone_is_left_alone() -> None:
    net, x = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), torch.randn(3, 5, 12)
    plan = Plan.preset("w8a8", net, x, sites={"self_attn.*": "float"})
    assert type(calibrated(net, plan, [x]).self_attn) is nn.MultiheadAttention


# --- what is stored -------------------------------------------------------------------------------------------------


def test_stored_codes_are_those_of_the_simulation_and_files_bring_them_back(tmp_path: Any) -> None:
    net, x = SelfAttention(), torch.randn(4, 6, 12)
    plan = Plan.preset("w4a8", net, x, sites={**ON, "*proj*weight": "int4/channel"})
    simulated = trained(calibrated(net, plan, [x]), [x])
    shipped = convert(simulated)
    codes = simulated.attn.in_proj_weight_quantizer(simulated.attn.in_proj_weight).values
    stored = torch.cat([part.weight.codes for part in shipped.attn.in_proj_weight])
    assert torch.equal(stored.float(), codes)
    assert not any("in_proj_weight" == name.rpartition(".")[2] for name in shipped.state_dict())
    save(shipped, tmp_path / "model")
    again = load(tmp_path / "model", SelfAttention())
    with torch.no_grad():
        assert torch.equal(again(x), simulated(x))
    rows = {row.path: row for row in coverage(shipped)}
    assert rows["attn.in_proj_weight"].format == "int4/channel"
    assert rows["attn.attention_0"].input.count("uint8/asym") == 4
    assert rows["attn.attention_0"].why == "rule '*attention_0.*'"
    assert {row.format for row in rows.values()} == {"int4/channel", "float", ""}
    stored = {id(t): t.nbytes for t in shipped.state_dict().values()}
    assert sum(row.bytes for row in coverage(shipped)) == sum(stored.values())


# --- functional calls -----------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Attention written three ways, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = torch.matmul(q, k.transpose(1, 2)) * 0.4
        mixed = torch.bmm(scores.softmax(-1), v) + scores.softmax(-1) @ v
        return self.out(torch.cat([mixed, F.scaled_dot_product_attention(q, k, v, is_causal=True)], dim=1))


FUNCTIONAL = {"*matmul_*": "uint8/asym", "cat_0.input": "uint8/asym", **ON}


def test_functional_products_are_named_and_trained_ones_equal_shipped() -> None:
    net, x = Functional().eval(), torch.randn(3, 5, 8)
    plan = Plan.preset("w8a8", net, x)
    names = {site.path for site in plan.sites if site.path not in dict(net.named_modules())}
    assert names == {"matmul_0", "matmul_1", "matmul_2", "cat_0", "attention_0"}
    assert "stay in float unless a rule gives them a spec" in plan.explain("matmul_0.input.0")
    plan = plan.with_sites(FUNCTIONAL)
    simulated = calibrated(net, plan, [x])
    with torch.no_grad():
        wanted = net(x)
        assert (simulated(x) - wanted).abs().max() < 0.05 * wanted.abs().max()
        assert not torch.equal(simulated(x), calibrated(net, "w8a8", [x])(x))
    assert unequal_kernels(trained(simulated, [x]), [x, 3 * x]) == []


def test_modules_for_forwards_that_cannot_be_traced() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.scores, self.join, self.attend = MatMul(), Cat(), Attention()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            if x.sum() > 1e9:
                return a
            return self.join([self.scores(a, b.transpose(1, 2)) @ x, self.attend(a, b, a)], 1)

    net, x = Written(), torch.randn(3, 5, 8)
    rules = {"scores.*": "int8", "join.input": "uint8/asym", "attend.*": "uint8/asym"}
    simulated = trained(calibrated(net, Plan.preset("w8a8", net, x, sites=rules), [x]), [x])
    assert type(simulated.scores).__name__ == "QMatMul"
    assert simulated.attend.probs_quantizer.scale.item() == pytest.approx(1 / 255)
    assert unequal_kernels(simulated, [x, 3 * x]) == []


def test_concatenated_tensors_share_one_scale() -> None:
    net, x = Functional(), torch.randn(3, 5, 8)
    simulated = calibrated(net, Plan.preset("w8a8", net, x, sites=FUNCTIONAL), [x])
    cat = simulated.cat_0
    out = cat([torch.ones(1, 2), torch.full((1, 2), 0.3)], 1)
    steps = out / cat.input_quantizer.scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)


@pytest.mark.parametrize("weight", ["int4/group4", "nf4/channel", "fp16"])
def test_float_products_stay_within_their_bound(weight: str) -> None:
    net, x = SelfAttention(), torch.randn(4, 6, 12)
    plan = Plan.preset("w8a8", net, x, sites={"*": "float", "*proj*weight": weight})
    simulated = trained(calibrated(net, plan, [x]), [x])
    with torch.no_grad():
        wanted = simulated(x)
        for features in (frozenset(), None):
            found = convert(simulated, features=features)(x)
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
