"""Reconstruction of layers and blocks: better on rows held out, or left as it was; and whatever happens, put back."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.algorithms import reconstruct
from bitwright.algorithms.layers import NotApplicableError
from bitwright.algorithms.lockstep import Call
from bitwright.algorithms.pipeline import outcomes
from bitwright.algorithms.samples import Samples
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.affine import encode
from nets import ResidualBlock, layers_of, one_thread  # noqa: F401

ROUNDS = {"adaround": {"iterations": 100}, "adaquant": {"iterations": 100}, "brecq": {"iterations": 100}}


def blocks() -> nn.Module:
    """A stem and a residual unit with batch norms whose statistics are those of its inputs."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), ResidualBlock(8, 8), ResidualBlock(8, 12))
    for _ in range(30):
        net(images(64))
    return net.eval()


def images(count: int) -> Tensor:
    """Smooth ones, so that inputs of a layer are correlated, as in photographs."""
    return nn.functional.interpolate(torch.randn(count, 3, 3, 3), size=8, mode="bilinear") + 0.1 * torch.randn(
        1, 3, 8, 8
    )


def quantized(
    net: nn.Module, data: list[Any], steps: Any, weight: str = "int2/channel", input: str = "uint4/asym"
) -> nn.Module:
    sites = {"*.weight": weight, "*.input": input}
    sites |= {"*.add_0.*": "uint8/asym"} if isinstance(net, nn.Sequential) and len(net) == 4 else {}
    model = bw.prepare(
        net, bw.Plan.preset("w4a8", net, data[0], sites=sites, steps=steps, observers={"weight": "minmax"})
    )
    bw.calibrate(model, data)
    return model.eval()


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for path, layer in layers_of(model).items():
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        assert quantizer.qparams is not None
        found[path] = encode(layer.folded()[0].detach(), quantizer.spec, quantizer.qparams)
    return found


def gains(model: nn.Module) -> dict[str, float]:
    """Error after a step as a share of that before, where it did something."""
    return {o.path: o.after / o.before for o in outcomes(model) if o.before is not None and o.after is not None}


def error(model: nn.Module, net: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return (model(x) - net(x)).square().mean().item()


@pytest.mark.parametrize("step", ROUNDS)
def test_it_is_better_than_the_nearest_codes_on_data_never_seen(step: str) -> None:
    net = blocks()
    data = [images(32) for _ in range(4)]
    fresh = images(64)
    nearest, found = quantized(net, data, ()), quantized(net, data, [{"name": step, **ROUNDS[step]}])
    assert error(found, net, fresh) < 0.9 * error(nearest, net, fresh)
    assert gains(found)
    assert all(gain < 1 for gain in gains(found).values())
    if step != "adaquant":
        floats = codes_of(nearest)
        moved = [(codes - floats[path]).abs().max().item() for path, codes in codes_of(found).items()]
        assert max(moved) == 1
    with torch.no_grad():
        assert torch.equal(found(fresh), bw.convert(found)(fresh))
    assert not any(p.grad is not None for p in found.parameters())
    assert all(isinstance(c, Quantizer) for layer in layers_of(found).values() for c in layer.children())


def test_a_block_at_once_is_better_than_its_layers_one_by_one() -> None:
    net = blocks()
    data = [images(32) for _ in range(4)]
    options = {"iterations": 100}
    layers = quantized(net, data, [{"name": "adaround", **options}], input="uint8/asym")
    block = quantized(net, data, [{"name": "brecq", "drop": 0.0, **options}], input="uint8/asym")
    assert {o.path for o in outcomes(block)} == {"0", "2", "3"}
    fresh = images(64)
    assert error(block, net, fresh) < error(layers, net, fresh)


def test_almost_every_weight_has_decided_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    original = reconstruct._optimise

    def watched(module: nn.Module, samples: Samples, problem: reconstruct.Problem, search: reconstruct.Search) -> None:
        original(module, samples, problem, search)
        seen.extend(soft.undecided() for soft in problem.soft)

    monkeypatch.setattr(reconstruct, "_optimise", watched)
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(48, 32), nn.ReLU()), [torch.randn(256, 8) @ torch.randn(8, 48) / 8]
    quantized(net, data, [{"name": "adaround", "iterations": 500}], weight="int3/channel", input="uint8/asym")
    assert len(seen) == 1
    assert seen[0] < 0.01


def test_ranges_of_inputs_are_learned_with_a_block() -> None:
    net, data = blocks(), [images(64)]
    nearest = quantized(net, data, (), input="uint3/asym")
    found = quantized(net, data, [{"name": "brecq", "iterations": 100}], input="uint3/asym")
    pairs = list(zip(_scales(nearest), _scales(found), strict=True))
    assert all(0.5 < (b / a).item() < 2 for a, b in pairs)
    assert sum(not torch.equal(a, b) for a, b in pairs) > len(pairs) // 2
    assert not any(b.requires_grad for _, b in pairs)


def _scales(model: nn.Module) -> list[Tensor]:
    found = [m.scale for m in model.modules() if isinstance(m, Quantizer) and not m.is_weight]
    return [scale for scale in found if scale is not None]


@pytest.mark.parametrize("step", ["adaquant", "brecq"])
def test_the_same_seed_gives_the_same_model(step: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(99 + len(states))
        model = quantized(blocks(), [_fixed(32)], [{"name": step, "iterations": 20, "seed": seed}])
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def _fixed(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_what_is_no_gain_on_held_out_rows_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = blocks(), [_fixed(32)]
    nearest = quantized(net, data, ())
    monkeypatch.setattr(reconstruct, "_optimise", lambda module, samples, problem, search: _spoil(problem))
    for step in ("adaquant", "brecq"):
        found = quantized(net, data, [{"name": step, "iterations": 5}])
        assert {outcome.skipped[:13] for outcome in outcomes(found)} == {"held-out rows"}
        assert all(torch.equal(value, state_of(nearest)[name]) for name, value in state_of(found).items())


@torch.no_grad()
def _spoil(problem: reconstruct.Problem) -> None:
    for group in problem.groups:
        for parameter in group["params"]:
            parameter.mul_(-3.0).add_(5.0)


@pytest.mark.parametrize("step", ["adaquant", "brecq"])
def test_an_interruption_leaves_no_trace(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*rest: Any) -> None:
        _spoil(rest[2])
        raise KeyboardInterrupt

    net, data = blocks(), [_fixed(32)]
    plan = bw.Plan.preset("w4a8", net, data[0], steps=[{"name": step, "iterations": 5}])
    model, threads = bw.prepare(net, plan), threading.active_count()
    monkeypatch.setattr(reconstruct, "_optimise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bw.calibrate(model, data)
    assert threading.active_count() == threads
    calibrated = bw.prepare(net, bw.Plan.preset("w4a8", net, data[0]))
    bw.calibrate(calibrated, data)
    assert all(torch.equal(value, state_of(calibrated)[name]) for name, value in state_of(model).items())
    assert all(
        p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), calibrated.parameters(), strict=True)
    )


def test_what_cannot_be_reconstructed_says_why() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    sites = {"0.weight": "nf4/group64", "0.input": "float", "2.weight": "int4/group32", "2.input": "float"}
    for step in ("adaround", "adaquant", "brecq"):
        plan = bw.Plan.preset("w4a16", net, torch.randn(2, 64), sites=sites, steps=[{"name": step, "iterations": 20}])
        model = bw.prepare(net, plan)
        bw.calibrate(model, [torch.randn(64, 64)])
        reasons = {outcome.path: outcome.skipped for outcome in outcomes(model)}
        assert "integer" in reasons["0"]
        assert "integer" not in reasons["2"]


def test_channels_that_the_batch_norm_kills_stay_as_they_are() -> None:
    net = blocks()
    with torch.no_grad():
        unit = net.get_submodule("2")
        assert isinstance(unit, ResidualBlock)
        assert unit.bn1.weight is not None
        unit.bn1.weight[2] = 0.0
    for step in ROUNDS:
        model = quantized(net, [images(32)], [{"name": step, "iterations": 30}])
        assert not codes_of(model)["2.conv1"][2].any()


def test_a_block_aims_at_the_float_model_whatever_earlier_steps_changed() -> None:
    net, data = blocks(), [_fixed(64)]
    alone = quantized(net, data, [{"name": "brecq", "iterations": 60}], weight="int4/channel")
    behind = quantized(net, data, ["bias_correction", {"name": "brecq", "iterations": 60}], weight="int4/channel")
    fresh = images(64)
    assert error(behind, net, fresh) < 1.1 * error(alone, net, fresh)


def test_rows_are_cut_where_all_tensors_share_an_axis_and_some_are_held_out() -> None:
    def call_of(*args: Any, **kwargs: Any) -> Call:
        return Call(args, kwargs, args, kwargs, args[0] + 1)

    samples = Samples([call_of(torch.arange(12.0).view(6, 2) + 100 * i, scale=2.0) for i in range(4)])
    held = torch.cat([call.args[0] for call in samples.held_out(2)])
    assert held[:, 0].tolist() == [102.0, 206.0, 310.0]
    generator = torch.Generator().manual_seed(0)
    seen: set[float] = set()
    for _ in range(20):
        call = samples.draw(5, generator)
        assert torch.equal(call.args[0] + 1, call.float_output)
        assert call.args[0].shape == (5, 2)
        seen |= set(call.args[0][:, 0].tolist())
    assert len(seen) == 21
    assert not seen & set(held[:, 0].tolist())

    whole = Samples([call_of(torch.zeros(3, 4, 2) + i, positions=torch.arange(4)) for i in range(3)])
    assert whole.draw(32, generator).args[0].shape == (3, 4, 2)
    with pytest.raises(NotApplicableError, match="at least 2"):
        Samples([call_of(torch.zeros(1, 4))])
    with pytest.raises(NotApplicableError, match="state"):
        Samples([call_of(torch.zeros(2, 4), cache=object())])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_transformer_layers_are_reconstructed(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 50}
    torch.manual_seed(0)
    if name == "bert":
        net = transformers.BertModel(transformers.BertConfig(num_attention_heads=2, **sizes), add_pooling_layer=False)
    else:
        net = transformers.LlamaModel(transformers.LlamaConfig(num_attention_heads=4, **sizes))
    batches = [{"input_ids": torch.randint(0, 50, (16, 7)), "use_cache": False} for _ in range(2)]
    sites = {"*proj.weight": "int3/channel"} if name == "llama" else {"*dense.weight": "int3/channel"}
    steps = [{"name": "brecq", "iterations": 60, "drop": 0.5}]
    model = bw.prepare(net.eval(), bw.Plan.preset("w4a8", net, batches[0], sites=sites, steps=steps))
    bw.calibrate(model, batches)
    found = [outcome for outcome in outcomes(model) if "layer" in outcome.path]
    assert len(found) == 2
    assert all(gains(model)[outcome.path] < 1 for outcome in found)
