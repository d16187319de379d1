"""A prepared model is the user's model with other classes: same parameters, keys, hooks, ties and isinstance."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import ModelError
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.nn.linear import QLinear
from bitwright.nn.quantizer import Stage
from bitwright.nn.swap import SWAPS, register_module
from bitwright.plan.plan import Plan
from bitwright.plan.site import OPERATORS
from models import Conv1dNet, EmbeddingNet, Encoder, Mlp, ResidualCnn, TiedLayers, TiedLm, image, with_statistics
from nets import calibrated, layer_plan, layers_of, one_thread  # noqa: F401

MODELS = {
    "cnn": (lambda: with_statistics(ResidualCnn()), image),
    "mlp": (Mlp, lambda: torch.randn(3, 16)),
    "conv1d": (lambda: with_statistics(Conv1dNet()), lambda: torch.randn(2, 2, 20)),
    "embedding": (EmbeddingNet, lambda: torch.randint(20, (2, 6))),
    "encoder": (Encoder, lambda: torch.randn(2, 5, 16)),
    "tied": (TiedLm, lambda: torch.randint(20, (2, 6))),
}


@pytest.mark.parametrize("kind", MODELS)
def test_keys_are_those_of_the_float_model_plus_quantizers(kind: str) -> None:
    net, x = MODELS[kind][0](), MODELS[kind][1]()
    prepared = prepare(net, Plan.preset("w8a8", net, x))
    own, added = net.state_dict(), {}
    for name, value in prepared.state_dict().items():
        if name in own:
            assert torch.equal(value, own.pop(name)), name
        else:
            added[name] = value
    assert not own
    assert added
    assert all(
        name.split(".")[-2].split("_quantizer")[0] in ("weight", "input", "input_0", "input_1") for name in added
    )
    assert {name.split(".")[-1] for name in added} <= {"scale", "zero_point"}
    missing, unexpected = prepared.load_state_dict(net.state_dict(), strict=False)
    assert set(missing) == set(added)
    assert unexpected == []


@pytest.mark.parametrize("kind", MODELS)
def test_before_calibration_it_computes_what_the_float_model_does(kind: str) -> None:
    net, x = MODELS[kind][0]().eval(), MODELS[kind][1]()
    prepared = prepare(net, Plan.preset("w8a8", net, x))
    with torch.no_grad():
        expected = net(x)
        assert (prepared(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        if not prepared.bitwright_plan.folds:
            assert torch.equal(prepared(x), expected)


def test_classes_change_and_stay_what_they_were() -> None:
    net = with_statistics(ResidualCnn())
    prepared = prepare(net, Plan.preset("w8a8", net, image()))
    for path, layer in layers_of(prepared).items():
        twin = net.get_submodule(path)
        assert type(layer).__name__ == f"Q{type(twin).__name__}"
        assert isinstance(layer, type(twin))
        assert not hasattr(twin, "weight_quantizer")
    assert type(prepared.layers[0]).__mro__[1] is type(net.layers[0])
    assert "1.weight: int8/channel, float" in repr(prepare(Named(), Plan.preset("w8a8", Named(), torch.zeros(1, 4))))


class Named(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def test_hooks_of_the_user_go_on_working() -> None:
    net, x = Mlp(), torch.randn(3, 16)
    seen: list[str] = []
    net[0].register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    net[2].register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    simulated = calibrated(net, "w8a8", [x])
    seen.clear()
    with torch.no_grad():
        assert torch.equal(simulated(x), simulated(2 * x))  # the pre-hook erases the input of 2
    assert seen == ["QLinear", "QLinear"]


def test_a_deep_copy_is_equal_and_independent() -> None:
    net, x = with_statistics(ResidualCnn()), image(4)
    simulated = calibrated(net, "w4a4", [x])
    twin = copy.deepcopy(simulated)
    with torch.no_grad():
        expected = simulated(x)
        assert torch.equal(twin(x), expected)
        twin.train()(x)
        twin.bn.weight.zero_()
        twin.stem.weight_quantizer.scale.mul_(2)
        assert torch.equal(simulated(x), expected)
        assert not torch.equal(twin.eval()(x), expected)
    assert twin.stem.norm[0] is twin.bn


def test_tied_weights_stay_tied_and_share_one_quantizer() -> None:
    net, x = TiedLayers(), torch.randn(4, 8)
    simulated = calibrated(net, "w8a8", [x])
    assert simulated.a.weight is simulated.b.weight
    assert simulated.a.weight_quantizer is simulated.b.weight_quantizer
    assert simulated.a.input_quantizer is not simulated.b.input_quantizer


def test_a_tied_table_stays_tied_where_rules_quantize_both_ends() -> None:
    net, ids = TiedLm(), torch.randint(20, (2, 6))
    plan = Plan.preset("w8a8", net, ids, sites={"*.weight": "int8/channel", "head.input": "uint8/asym"})
    simulated = calibrated(net, plan, [ids])
    assert simulated.head.weight is simulated.embedding.weight
    shipped = convert(simulated)
    assert torch.equal(shipped(ids), simulated(ids).detach())


def test_modules_that_consume_one_tensor_share_one_input_quantizer() -> None:
    net, x = Encoder(), torch.randn(2, 5, 16)
    simulated = calibrated(net, "w8a8", [x])
    assert simulated.q.input_quantizer is simulated.k.input_quantizer is simulated.v.input_quantizer
    assert simulated.up.input_quantizer is not simulated.q.input_quantizer


def test_embedding_rows_quantized_after_the_lookup_equal_the_quantized_table() -> None:
    ids = torch.randint(30, (4, 7))
    for spec in ("int8/channel", "int4/group4", "uint4/channel/asym", "nf4/channel", "int8", "bf16"):
        layer = nn.Embedding(30, 8)
        simulated = calibrated(layer, layer_plan(layer, spec), [])
        table = simulated.weight_quantizer.simulate(simulated.weight)
        assert torch.equal(simulated(ids), table[ids])
        assert not torch.equal(simulated(ids), layer(ids))


def test_only_touched_rows_of_an_embedding_get_a_gradient() -> None:
    layer = nn.Embedding(30, 8, padding_idx=3)
    simulated = calibrated(layer, layer_plan(layer, "int8/channel"), [])
    simulated(torch.tensor([1, 3, 5, 5])).sum().backward()
    assert simulated.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 5]


def test_a_registered_subclass_is_quantized_as_its_base() -> None:
    class Bounded(nn.Linear):
        """Adds a method only."""

        def bound(self) -> Tensor:
            return self.weight.abs().sum()

    net = nn.Sequential(Bounded(6, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(4, 6)
    with pytest.raises(ModelError, match=r"0 is Bounded, a subclass of nn\.Linear"):
        Plan.preset("w8a8", net, x)
    assert register_module(Bounded) is Bounded
    try:
        simulated = calibrated(net, "w8a8", [x])
        assert isinstance(simulated[0], QLinear)
        assert isinstance(simulated[0], Bounded)
        assert simulated[0].bound() > 0
        assert type(simulated[0]).__name__ == "QBounded"
        assert torch.equal(convert(simulated)(x), simulated(x).detach())
        with pytest.raises(ModelError, match="cannot register Bounded: it is known already"):
            register_module(Bounded)
    finally:
        del SWAPS[Bounded], OPERATORS[Bounded]


@pytest.mark.parametrize(
    ("cls", "reason"), [(nn.Linear, "it is known already"), (nn.ReLU, "no known layer is its base")]
)
def test_only_subclasses_of_known_layers_can_be_registered(cls: type[nn.Module], reason: str) -> None:
    with pytest.raises(ModelError, match=f"cannot register {cls.__name__}: {reason}"):
        register_module(cls)
    assert (cls in SWAPS) == (cls is nn.Linear)


def test_a_simulated_layer_computes_in_float_again_when_its_stage_says_so() -> None:
    net, x = Mlp(), torch.randn(3, 16)
    simulated = calibrated(net, "w4a4", [x])
    assert not torch.equal(simulated(x), net(x))
    for layer in layers_of(simulated).values():
        layer.weight_quantizer.stage = Stage.FLOAT
    assert torch.equal(simulated(x), net(x))
