"""What each preset makes of the small models: formats, and what stays in float and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import ModelError, PlanError
from bitwright.graph.calls import Add
from bitwright.plan.plan import Plan
from bitwright.plan.presets import PRESETS
from bitwright.plan.site import OPERATORS, Site
from bitwright.plan.target import spelled
from models import (
    ActivatedNorm,
    Conv1dNet,
    EmbeddingNet,
    Encoder,
    Heads,
    Mlp,
    ResidualCnn,
    TiedLayers,
    TiedLm,
    image,
)

CLASSIFIER = "the classifier stays in float by default"
IDS = torch.zeros(1, 4, dtype=torch.long)


def table(plan: Plan) -> dict[str, str]:
    return {str(site): spelled(spec) for site, spec in plan.sites.items()}


def why(plan: Plan, site: str) -> str:
    return plan.why[Site.parse(site)]


CNN_CONVS = ["stem", "layers.1.down.0", *(f"layers.{b}.conv{i}" for b in (0, 1, 2) for i in (1, 2))]
CNN_ADDS = [f"layers.{b}.add_0" for b in (0, 1, 2)]


def test_w8a8_on_the_residual_net_quantizes_everything_but_the_classifier():
    plan = Plan.preset("w8a8", ResidualCnn(), image())
    expected = {f"{path}.weight": "int8/channel" for path in CNN_CONVS}
    expected |= {f"{path}.input": "uint8/asym" for path in CNN_CONVS}
    expected |= {f"{path}.input.{i}": "uint8/asym" for path in CNN_ADDS for i in (0, 1)}
    expected |= {"fc.weight": "float", "fc.input": "float"}
    assert table(plan) == expected
    assert why(plan, "fc.weight") == why(plan, "fc.input") == CLASSIFIER
    assert why(plan, "stem.weight") == "preset w8a8"
    assert why(plan, "layers.0.add_0.input.1") == "residual add"
    assert set(plan.folds) == set(CNN_CONVS)
    assert set(plan.why) == set(plan.sites), "every decision has a reason"
    assert (plan.target, plan.observers) == ("cpu", {"weight": "mse", "input": "mse"})


@pytest.mark.parametrize(
    ("name", "weight", "first", "activation", "add"),
    [
        ("w8a8", "int8/channel", "int8/channel", "uint8/asym", "uint8/asym"),
        ("w8a8-dynamic", "int8/channel", "int8/channel", "uint8/asym/dynamic", "float"),
        ("w4a8", "int4/channel", "int8/channel", "uint8/asym", "uint8/asym"),
        ("w4a4", "int4/channel", "int8/channel", "uint4/asym", "uint8/asym"),
        ("w4a16", "int4/channel", "int4/channel", "float", "float"),
        ("nf4", "nf4/channel", "nf4/channel", "float", "float"),
        ("mxfp4", "fp4/channel", "fp4/channel", "float", "float"),
        ("fp8", "fp8_e4m3/channel", "fp8_e4m3/channel", "float", "float"),
        ("fp16", "fp16", "fp16", "float", "float"),
    ],
)
def test_every_preset_on_the_residual_net(name, weight, first, activation, add):
    found = table(Plan.preset(name, ResidualCnn(), image()))
    assert found["layers.0.conv1.weight"] == weight
    assert found["layers.0.conv1.input"] == activation
    assert found["stem.weight"] == first
    assert found["stem.input"] == ("uint8/asym" if name == "w4a4" else activation)
    assert found["layers.0.add_0.input.0"] == add
    assert found["fc.weight"] == "float"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("target", ["cpu", "onnxruntime"])
def test_presets_either_run_on_a_target_or_are_refused_with_its_choices(name, target):
    models = {"cnn": (ResidualCnn(), image()), "text": (EmbeddingNet(), IDS), "mlp": (Mlp(), torch.randn(1, 16))}
    for model, example in models.values():
        try:
            plan = Plan.preset(name, model, example, target=target)
        except PlanError as error:
            refused = ("w8a8-dynamic", "nf4", "mxfp4", "fp8", "fp16")
            assert target == "onnxruntime" and name in refused, error  # noqa: PT017, PT018
            assert f"target {target} has no" in str(error)  # noqa: PT017
            assert "it has weight" in str(error)  # noqa: PT017
        else:
            assert any(spec is not None for spec in plan.sites.values())


def test_w4a8_says_why_the_first_layer_keeps_eight_bits():
    plan = Plan.preset("w4a8", ResidualCnn(), image())
    assert why(plan, "stem.weight") == "preset w4a8: a layer that sees the raw input keeps 8 bits"
    assert why(plan, "layers.0.conv1.weight") == "preset w4a8"


def test_a_group_that_does_not_divide_a_layer_becomes_one_scale_per_channel_and_says_so():
    model = nn.Sequential(nn.Linear(256, 100), nn.ReLU(), nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 2))
    plan = Plan.preset("w4a16", model, torch.randn(1, 256))
    assert table(plan)["0.weight"] == "int4/group128"
    assert table(plan)["2.weight"] == "int4/channel"
    assert why(plan, "2.weight") == (
        "preset w4a16: int4/group128 does not divide 100 inputs, one scale per channel instead"
    )


def test_groups_of_scales_become_ones_that_divide_their_number_and_the_plan_says_so():
    model = nn.Sequential(
        nn.Linear(64, 512), nn.Linear(512, 36), nn.Linear(36, 64), nn.Linear(64, 257), nn.Linear(257, 2)
    )
    plan = Plan.preset("nf4", model, torch.randn(1, 64))
    found = table(plan)
    assert found["0.weight"] == "nf4/group64/scale(int8/group256)"
    assert why(plan, "0.weight") == "preset nf4"
    assert found["1.weight"] == "nf4/group64/scale(int8/group144)"
    assert why(plan, "1.weight") == "preset nf4: groups of 256 do not divide 288 scales"
    assert found["2.weight"] == "nf4/channel"
    assert found["3.weight"] == "nf4/group64"


def test_scales_of_joint_projections_are_counted_per_part():
    net = nn.Sequential(nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), nn.Linear(64, 2))
    plan = Plan.preset("nf4", net, torch.randn(1, 3, 64))
    assert table(plan)["0.self_attn.in_proj_weight"] == "nf4/group64/scale(int8/group64)"


def test_embeddings_have_a_weight_only_and_position_adds_are_no_sites():
    plan = Plan.preset("w8a8", EmbeddingNet(), IDS)
    assert table(plan) == {
        "words.weight": "int8/channel",
        "positions.weight": "int8/channel",
        "hidden.weight": "int8/channel",
        "hidden.input": "uint8/asym",
        "fc.weight": "float",
        "fc.input": "float",
    }


def test_residual_adds_into_layer_norms_stay_in_float():
    plan = Plan.preset("w8a8", Encoder(), torch.randn(1, 4, 16))
    adds = {text: value for text, value in table(plan).items() if "add_" in text}
    assert adds == {f"add_{i}.input.{j}": "float" for i in (2, 3) for j in (0, 1)}
    assert why(plan, "add_2.input.0") == "residual add into a layer norm, which stays in float"
    assert table(plan)["q.weight"] == "int8/channel"
    assert table(plan)["classifier.weight"] == "float"


def test_a_residual_add_that_cannot_be_named_stays_in_float_and_says_why():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            if x.sum() > 1e9:
                raise RuntimeError
            return self.fc(x + self.b(x))

    plan = Plan.preset("w8a8", Net(), torch.randn(1, 8))
    assert table(plan)["add_0.input.0"] == table(plan)["add_0.input.1"] == "float"
    assert why(plan, "add_0.input.0").startswith(
        "residual add that cannot be named: Net.forward cannot be traced (TraceError:"
    )
    assert why(plan, "add_0.input.0").endswith("; write it as bitwright.Add")


def test_a_module_add_is_a_site_of_its_own_name():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.join, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), Add(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            return self.fc(self.join(h, self.b(h)))

    plan = Plan.preset("w8a8", Net(), torch.randn(1, 8))
    assert table(plan)["join.input.0"] == table(plan)["join.input.1"] == "uint8/asym"
    assert plan.shared == {Site("join", "input.0"): Site("b", "input")}


# --- one decision for one tensor -------------------------------------------------------------------------------


def test_consumers_of_one_tensor_share_one_quantizer():
    plan = Plan.preset("w8a8", ResidualCnn(), image())
    shared = {str(site): str(leader) for site, leader in plan.shared.items()}
    assert shared == {
        "layers.0.add_0.input.0": "layers.0.conv1.input",
        "layers.1.down.0.input": "layers.1.conv1.input",
        "layers.2.add_0.input.1": "layers.2.conv1.input",
    }
    shared = Plan.preset("w8a8", Encoder(), torch.randn(1, 4, 16)).shared
    assert shared == {Site("k", "input"): Site("q", "input"), Site("v", "input"): Site("q", "input")}


def test_an_operand_that_no_call_produced_shifts_nobodys_quantizer():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc, self.join = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2), Add()
            self.offset = nn.Parameter(torch.ones(1, 8))

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.a(x))
            return self.fc(F.relu(self.join(self.offset, h) * self.b(h)))

    assert Plan.preset("w8a8", Net(), torch.randn(1, 8)).shared == {Site("b", "input"): Site("join", "input.1")}


def test_inputs_of_layers_that_run_twice_are_not_shared():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.a(x)) * self.b(x) * self.a(x * 2))

    assert Plan.preset("w8a8", Net(), torch.randn(1, 8)).shared == {}


def test_tied_weights_share_one_decision():
    plan = Plan.preset("w8a8", TiedLayers(), torch.randn(1, 8))
    assert table(plan)["a.weight"] == table(plan)["b.weight"] == "int8/channel"
    assert plan.shared == {Site("b", "weight"): Site("a", "weight")}


def test_tied_weights_with_batch_norms_of_their_own_do_not_share_scales():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
            self.b.weight = self.a.weight
            self.bn_a, self.bn_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn_a(self.a(x)))
            return self.fc(F.relu(self.bn_b(self.b(x))).mean((2, 3)))

    plan = Plan.preset("w8a8", Net(), image())
    assert plan.folds == {"a": "bn_a", "b": "bn_b"}
    assert plan.shared == {}


def test_an_embedding_tied_to_the_classifier_stays_in_float_with_it():
    plan = Plan.preset("w8a8", TiedLm(), IDS)
    assert table(plan)["head.weight"] == table(plan)["embedding.weight"] == "float"
    assert why(plan, "head.weight") == CLASSIFIER
    assert why(plan, "embedding.weight") == f"tied to head: {CLASSIFIER}"
    assert table(plan)["hidden.weight"] == "int8/channel"


def test_a_weight_that_a_function_reads_stays_in_float():
    plan = Plan.preset("w8a8", TiedLm(functional=True), IDS)
    assert table(plan)["embedding.weight"] == "float"
    assert why(plan, "embedding.weight") == "its weight is read by linear behind the module's back"


def test_attention_has_its_projections_and_its_products_stay_in_float():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    plan = Plan.preset("w8a8", layer, torch.randn(1, 4, 16))
    weights = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert {table(plan)[site] for site in weights} == {"int8/channel"}
    assert {table(plan)[f"self_attn.attention_0.{slot}"] for slot in ("query", "key", "value", "probs")} == {"float"}
    assert why(plan, "add_0.input.0") == "residual add into a layer norm, which stays in float"
    assert [str(site) for site in plan.shared] == ["self_attn.key", "self_attn.value"]


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_all_heads_are_classifiers(kind):
    plan = Plan.preset("w8a8", Heads(kind), torch.randn(1, 8))
    assert table(plan)["left.weight"] == table(plan)["right.weight"] == "float"
    assert table(plan)["trunk.weight"] == "int8/channel"


def test_a_batch_norm_that_computes_more_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ActivatedNorm(4), nn.Flatten(), nn.Linear(144, 2))
    assert Plan.preset("w8a8", model, image()).folds == {}


def test_one_dimensional_convolutions_have_sites_and_folds():
    plan = Plan.preset("w8a8", Conv1dNet(), torch.randn(1, 2, 9))
    assert table(plan)["conv2.weight"] == "int8/channel"
    assert plan.folds == {"conv1": "norm1"}


def test_planning_leaves_the_model_as_it_was():
    model = ResidualCnn().train()
    classes = [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    Plan.preset("w8a8", model, image())
    assert [type(module) for module in model.modules()] == classes
    assert model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- unknown things ---------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def scaled_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Scaled(8, 8), nn.ReLU(), nn.Linear(8, 2))


def test_an_unknown_subclass_of_a_known_layer_is_an_error_that_says_what_to_do():
    with pytest.raises(
        ModelError, match=r"2 is Scaled, a subclass of nn\.Linear whose forward bitwright does not"
    ) as error:
        Plan.preset("w8a8", scaled_model(), torch.randn(1, 8))
    assert "register it with bitwright.register_module" in str(error.value)
    assert "sites={'2.*': 'float'}" in str(error.value)


@pytest.mark.parametrize("rules", [{"2.*": "float"}, {"2.weight": None}])
def test_an_unknown_subclass_may_be_kept_in_float(rules):
    plan = Plan.preset("w8a8", scaled_model(), torch.randn(1, 8), sites=rules)
    assert table(plan)["2.weight"] == table(plan)["2.input"] == "float"
    assert table(plan)["0.weight"] == "int8/channel"


def test_other_rules_do_not_excuse_an_unknown_subclass():
    with pytest.raises(ModelError, match="2 is Scaled"):
        Plan.preset("w8a8", scaled_model(), torch.randn(1, 8), sites={"2.*": "int8/channel", "0.*": "float"})


def test_an_unknown_subclass_may_be_registered():
    from bitwright.nn.swap import SWAPS, register_module

    register_module(Scaled)
    try:
        plan = Plan.preset("w8a8", scaled_model(), torch.randn(1, 8))
        assert table(plan)["2.weight"] == "int8/channel"
    finally:
        del OPERATORS[Scaled], SWAPS[Scaled]


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(
        PlanError,
        match="unknown preset 'w2a2'; known presets: w8a8, w8a8-dynamic, w4a8, w4a4, w4a16, nf4, mxfp4, fp8, fp16",
    ):
        Plan.preset("w2a2", Mlp(), torch.randn(1, 16))


def test_a_classifier_may_be_quantized_when_asked():
    plan = Plan.preset("w8a8", Mlp(), torch.randn(1, 16), sites={"4.weight": "int8/channel", "4.input": "uint8/asym"})
    assert table(plan)["4.weight"] == "int8/channel"
    assert why(plan, "4.weight") == "rule '4.weight'"
