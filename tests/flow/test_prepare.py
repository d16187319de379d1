"""`prepare` changes a copy or nothing, and says what is wrong with a model or a plan."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError, ModelError, PlanError
from bitwright.flow.convert import convert
from bitwright.flow.prepare import plan_of, prepare
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site
from models import Mlp, ResidualCnn, TiedLayers, image, with_statistics
from nets import calibrated, layers_of, one_thread  # noqa: F401

X = torch.zeros(2, 16)
INT8 = QuantSpec.parse("int8/channel")


def snapshot(model: nn.Module) -> tuple[dict[str, type], dict[str, Tensor]]:
    return {name: type(m) for name, m in model.named_modules()}, copy.deepcopy(model.state_dict())


def unchanged(model: nn.Module, before: tuple[dict[str, type], dict[str, Tensor]]) -> bool:
    classes, state = snapshot(model)
    same = state.keys() == before[1].keys() and all(torch.equal(state[name], before[1][name]) for name in state)
    return same and classes == before[0] and not hasattr(model, "bitwright_plan")


def test_the_given_model_is_left_untouched() -> None:
    net = with_statistics(ResidualCnn())
    before = snapshot(net)
    prepared = prepare(net, Plan.preset("w8a8", net, image()))
    assert unchanged(net, before)
    assert layers_of(prepared)
    shared = {id(p) for p in net.parameters()} & {id(p) for p in prepared.parameters()}
    assert not shared


def test_in_place_the_given_model_is_prepared_with_its_own_parameters() -> None:
    net = with_statistics(ResidualCnn())
    parameters = dict(net.named_parameters())
    plan = Plan.preset("w8a8", net, image())
    assert prepare(net, plan, inplace=True) is net
    assert plan_of(net) is plan
    assert layers_of(net)
    assert all(dict(net.named_parameters())[name] is parameter for name, parameter in parameters.items())


def test_a_model_that_is_one_layer_can_be_prepared() -> None:
    net = nn.Linear(4, 3)
    plan = Plan("cpu", {Site("", "weight"): INT8, Site("", "input"): QuantSpec.parse("uint8/asym")})
    shipped = convert(calibrated(net, plan, [torch.randn(5, 4)]))
    assert type(shipped).__name__ == "LowbitLinear"
    assert plan_of(shipped) is plan


class NoLayers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) ** 2


class WithOdd(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.ReLU(), Odd(16, 16), nn.ReLU(), nn.Linear(16, 2))


def broken(change: str) -> nn.Module:
    net = Mlp()
    with torch.no_grad():
        if change == "nan":
            net[2].weight[1, 2:4] = torch.nan
        if change == "inf":
            net[0].weight[0, 0] = -torch.inf
    if change in ("half", "bfloat16", "double"):
        net = getattr(net, change)()
    if change == "meta":
        net = net.to("meta")
    if change == "lazy":
        net[2] = nn.LazyLinear(4)
    return net


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", r"2\.weight: 2 of 1024 weights are NaN or infinite; repair the checkpoint"),
        ("inf", r"0\.weight: 1 of 512 weights are NaN or infinite; repair the checkpoint"),
        ("half", r"0\.weight is torch\.float16; codes are defined on float32: call model\.float\(\) first"),
        ("bfloat16", r"0\.weight is torch\.bfloat16; .* call model\.float\(\)"),
        ("double", r"0\.weight is torch\.float64; .* call model\.float\(\)"),
        ("meta", r"0\.weight is on the meta device and holds no numbers; load its weights first"),
        ("lazy", r"2\.weight is a lazy parameter without a shape; run one batch through the model first"),
    ],
)
def test_a_model_whose_weights_are_no_float32_numbers_is_refused(change: str, message: str) -> None:
    plan = Plan.preset("w8a8", Mlp(), X)
    net = broken(change)
    classes = [type(module) for module in net.modules()]
    for inplace in (False, True):
        with pytest.raises(ModelError, match=message):
            prepare(net, plan, inplace=inplace)
    assert [type(module) for module in net.modules()] == classes


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_are_named_before_a_plan_is_made() -> None:
    with pytest.raises(ModelError, match=r"2\.weight is a lazy parameter"):
        Plan.preset("w8a8", broken("lazy"), X)


def test_a_model_without_a_supported_layer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"nothing to quantize: NoLayers has no Linear, Conv1d, .* made of NoLayers"):
        Plan.preset("w8a8", NoLayers(), X)
    with pytest.raises(PlanError, match=r"nothing was quantized: all 2 sites stay in float \(the classifier stays"):
        Plan.preset("w8a8", nn.Sequential(nn.Linear(16, 2)), X)


@pytest.mark.parametrize("preset", ["w8a8", "w4a16"])
def test_an_unknown_subclass_is_named_and_can_be_kept_in_float(preset: str) -> None:
    message = r"2 is Odd, a subclass of nn\.Linear whose forward .* bitwright\.register_module, or keep it in float"
    with pytest.raises(ModelError, match=message):
        Plan.preset(preset, WithOdd(), X)
    plan = Plan.preset(preset, WithOdd(), X, sites={"2.*": "float"})
    prepared = prepare(WithOdd(), plan)
    assert type(prepared[2]) is Odd
    assert "0" in layers_of(prepared)


def test_an_unknown_subclass_in_a_hand_written_plan_is_refused() -> None:
    plan = Plan.preset("w8a8", Mlp(16, 16, 2), X)
    with pytest.raises(PlanError, match=r"2 is Odd, an unknown subclass of nn\.Linear; register it"):
        prepare(WithOdd(), plan)


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ({"layer9.weight": "int8/channel"}, "'layer9.weight' matches none of the 6 sites; near names: "),
        ({"0.weight": "int9"}, "unknown number format 'int9'; known formats: int2, int3"),
        ({"0.weight": "int4/row"}, "cannot read 'row' in quantization spec 'int4/row'; expected channel"),
        (
            {"0.weight": "int4/group7"},
            r"0\.weight: group7 needs a last axis divisible by 7, found shape \[32, 16\]; use",
        ),
        ({"0.weight": "int8/token/dynamic"}, r"0\.weight: int8/token/dynamic is dynamic, but weights are stored"),
        ({"0.weight": "nf4"}, "0: target cpu has no linear kernel for weight nf4 with input uint8/asym; it has weight"),
        ({"0.weight": "float"}, "0: target cpu has no linear kernel for weight float with input uint8/asym"),
        ({"0.input": "uint8/group4/asym/dynamic"}, "0: target cpu has no linear kernel for weight int8/channel with"),
    ],
    ids=str,
)
def test_rules_that_cannot_be_served_name_the_site_and_the_way_out(rules: dict[str, str], error: str) -> None:
    plan = Plan.preset("w8a8", Mlp(), X)
    before = dict(plan.sites)
    with pytest.raises(BitwrightError, match=error):
        prepare(Mlp(), plan.with_sites(rules))
    with pytest.raises(BitwrightError, match=error):
        Plan.preset("w8a8", Mlp(), X, sites=rules)
    assert plan.sites == before


def test_unknown_targets_and_presets_list_the_known_ones() -> None:
    with pytest.raises(PlanError, match="unknown target 'gpu9'; known targets: cpu, onnxruntime"):
        Plan.preset("w8a8", Mlp(), X, target="gpu9")
    with pytest.raises(PlanError, match="unknown preset 'w9a9'; known presets: w8a8, "):
        Plan.preset("w9a9", Mlp(), X)
    with pytest.raises(PlanError, match="unknown target 'gpu9'"):
        prepare(Mlp(), Plan("gpu9", dict(Plan.preset("w8a8", Mlp(), X).sites)))


def test_a_plan_for_another_model_names_what_is_missing() -> None:
    plan = Plan.preset("w8a8", with_statistics(ResidualCnn()), image())
    with pytest.raises(PlanError, match=r"the plan names stem\.weight, but the model has no module 'stem'"):
        prepare(Mlp(), plan)


@pytest.mark.parametrize("inplace", [False, True])
def test_preparing_twice_is_refused(inplace: bool) -> None:
    net = Mlp()
    plan = Plan.preset("w8a8", net, X)
    prepared = prepare(net, plan)
    with pytest.raises(ModelError, match="this model is prepared already; prepare the float model"):
        prepare(prepared, plan, inplace=inplace)
    shipped = convert(calibrated(net, plan, [X]))
    with pytest.raises(BitwrightError, match="LowbitLinear, which has no quantized form"):
        prepare(shipped, plan, inplace=inplace)


def with_add(plan: Plan, name: str) -> None:
    plan.sites.update({Site(f"layers.0.{name}", f"input.{n}"): plan.sites[Site("stem", "input")] for n in (0, 1)})


TAMPERED = {
    "fold into another size": (
        lambda plan: plan.folds.update(stem="layers.1.bn1"),
        r"\[folds\] stem = layers\.1\.bn1: Ba",
    ),
    "fold of no norm": (
        lambda plan: plan.folds.update(stem="relu"),
        r"\[folds\] stem = relu: ReLU\(\) cannot fold into",
    ),
    "fold twice": (lambda plan: plan.folds.update(stem="layers.0.bn1"), "a batch norm folds into one layer only"),
    "fold into nothing": (lambda plan: plan.folds.update(stem="nowhere"), "the model has no module 'nowhere'"),
    "shared weights": (
        lambda plan: plan.shared.update({Site("stem", "weight"): Site("layers.0.conv1", "weight")}),
        r"\[shared\] stem\.weight = layers\.0\.conv1\.weight: these are not one tensor",
    ),
    "shared with an input": (
        lambda plan: plan.shared.update({Site("stem", "weight"): Site("stem", "input")}),
        r"\[shared\] stem\.weight = stem\.input: these are not one tensor",
    ),
    "add that is not there": (
        lambda plan: with_add(plan, "add_7"),
        r"layers\.0: cannot name its adds: Block\.forward has 1 adds, the plan names add_7",
    ),
    "add with an odd number": (lambda plan: with_add(plan, "add_00"), r"layers\.0\.add_00\.input\.0: adds are called"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", TAMPERED)
def test_structure_that_does_not_hold_for_the_model_changes_nothing(kind: str, inplace: bool) -> None:
    net = with_statistics(ResidualCnn())
    plan = copy.deepcopy(Plan.preset("w8a8", net, image()))
    change, message = TAMPERED[kind]
    change(plan)
    before = snapshot(net)
    with pytest.raises(PlanError, match=message):
        prepare(net, plan, inplace=inplace)
    assert unchanged(net, before)


def test_weights_that_are_no_longer_tied_are_refused() -> None:
    net, x = TiedLayers(), torch.randn(4, 8)
    plan = Plan.preset("w8a8", net, x)
    assert plan.shared == {Site("b", "weight"): Site("a", "weight")}
    simulated = calibrated(net, plan, [x])
    assert simulated.a.weight is simulated.b.weight
    assert simulated.a.weight_quantizer is simulated.b.weight_quantizer
    net.b.weight = nn.Parameter(net.b.weight.detach().clone())
    with pytest.raises(PlanError, match=r"\[shared\] b\.weight = a\.weight: these are not one tensor in this model"):
        prepare(net, plan)


def test_an_embedding_that_rewrites_itself_is_refused() -> None:
    net = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"0\.weight: an embedding with max_norm .* set the site to 'float'"):
        prepare(net, Plan.preset("w8a8", net, torch.arange(3)))


def encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)).eval()


def test_attention_is_opened_where_only_its_output_projection_is_quantized() -> None:
    net, x = encoder(), torch.randn(2, 5, 8)
    plan = Plan.preset("w8a8", net, x, sites={"*": "float", "*out_proj.weight": "int4/channel"})
    simulated = calibrated(net, plan, [x])
    with torch.no_grad():
        assert not torch.allclose(simulated(x), net(x))
        torch.testing.assert_close(convert(simulated)(x), simulated(x))  # float inputs: sums in another order


def test_the_fused_path_of_an_encoder_layer_cannot_pass_its_quantized_layers() -> None:
    net, x = encoder(), torch.randn(2, 5, 8)
    simulated = calibrated(
        net, Plan.preset("w4a8", net, x, sites={"1.*": "int4/channel", "1.input": "uint8/asym"}), [x]
    )
    shipped = convert(simulated)
    expected = simulated(x)  # with gradients torch never takes the fused path
    with torch.no_grad():
        assert not torch.equal(net(x), expected)
        assert torch.equal(simulated(x), expected)
        assert torch.equal(shipped(x), expected)
    assert net[0].activation_relu_or_gelu == 1


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_a_stack_of_encoder_layers_keeps_its_quantized_layers_under_a_padding_mask() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    batch = {"src": x, "src_key_padding_mask": mask}
    simulated = calibrated(net, Plan.preset("w8a8", net, batch), [batch])
    expected = simulated(**batch).detach()
    with torch.no_grad():
        assert torch.equal(simulated(**batch)[0], expected[0])
        assert torch.equal(convert(simulated)(**batch)[0], expected[0])
