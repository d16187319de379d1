"""Models of the transformers library: their attention, `Conv1D` and experts have sites, and trained equals shipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.flow.calibrate import calibrate
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.nn.attention import QAttention
from bitwright.plan.plan import Plan
from nets import calibrated, one_thread, trained, unequal_kernels  # noqa: F401

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 50}
ON = {"*.attention_0.*": "uint8/asym"}
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


class Outputs(nn.Module):
    """A library model that returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False)[0]


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(num_attention_heads=2, **SIZES), add_pooling_layer=False)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES)
    )


@pytest.mark.parametrize("make", [bert, llama])
def test_attention_of_library_models_is_routed_to_its_sites(make: Any) -> None:
    net = Outputs(make()).eval()
    plan = Plan.preset("w8a8", net, IDS)
    paths = {site.path for site in plan.sites if site.path.endswith("attention_0")}
    assert len(paths) == 2
    simulated = calibrated(net, plan.with_sites(ON), [IDS])
    assert {path for path, m in simulated.named_modules() if isinstance(m, QAttention)} == paths
    with torch.no_grad():
        wanted = net(IDS)
        assert (simulated(IDS) - wanted).abs().max() < 0.05 * wanted.abs().max()
        assert not torch.equal(simulated(IDS), calibrated(net, plan, [IDS])(IDS))
    assert unequal_kernels(trained(simulated, [IDS], steps=4), [IDS, IDS[:1, :5]]) == []


def test_padding_masks_reach_the_routed_attention() -> None:
    net = bert().eval()
    batch = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    simulated = calibrated(net, Plan.preset("w8a8", net, batch, sites=ON), [batch])
    with torch.no_grad():
        other = {**batch, "input_ids": IDS.clone()}
        other["input_ids"][1, 4:] = 3
        seen = [simulated(**b).last_hidden_state[1, :4] for b in (batch, other)]
        assert torch.equal(*seen)


def test_both_forms_generate_the_same_tokens_with_a_cache() -> None:
    net = llama().eval()
    simulated = calibrated(net, Plan.preset("w8a8", net, {"input_ids": IDS}, sites=ON), [{"input_ids": IDS}])
    tokens = [
        m.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (simulated, convert(simulated))
    ]
    assert torch.equal(*tokens)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    )


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a16", "w8a8-dynamic"])
def test_weights_stored_the_other_way_round_equal_shipped(preset: str) -> None:
    net = Outputs(gpt2()).eval()
    plan = Plan.preset(preset, net, IDS, sites={"model.lm_head.*": "float", "*wte.weight": "float"})
    simulated = calibrated(net, plan, [IDS])
    layer = simulated.get_submodule("model.transformer.h.0.attn.c_attn")
    assert layer.weight.shape == (16, 48)
    assert preset == "w4a16" or layer.weight_quantizer.scale.shape == (48, 1)
    with torch.no_grad():
        wanted = net(IDS)
        assert (simulated(IDS) - wanted).abs().max() < (0.5 if "4" in preset else 0.05) * wanted.abs().max()
    simulated = trained(simulated, [IDS], steps=4)
    if preset != "w4a16":
        assert unequal_kernels(simulated, [IDS]) == []
    shipped = convert(simulated)
    with torch.no_grad():
        assert torch.allclose(shipped(IDS), simulated(IDS), atol=1e-5)
    packed = shipped.get_submodule("model.transformer.h.0.attn.c_attn").weight
    assert packed.shape == (48, 16)


def mixtral() -> nn.Module:
    sizes = {**SIZES, "num_local_experts": 6, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)
    )


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w8a8-dynamic"])
def test_trained_experts_equal_shipped(preset: str) -> None:
    net = Outputs(mixtral()).eval()
    plan = Plan.preset(preset, net, IDS, sites={"model.lm_head.*": "float"})
    experts = "model.model.layers.0.mlp.experts"
    assert plan.explain(f"{experts}.gate_up_proj").startswith(f"{experts}.gate_up_proj: int")
    assert not any("mlp.gate" in str(site) for site, spec in plan.sites.items() if spec is not None)
    simulated = calibrated(net, plan, [IDS])
    assert simulated.get_submodule(experts).gate_up_proj_quantizer.scale.shape == (6 * 64, 1)
    with torch.no_grad():
        wanted = net(IDS)
        assert (simulated(IDS) - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert unequal_kernels(trained(simulated, [IDS], steps=4), [IDS]) == []


def test_experts_with_float_inputs_stay_within_their_bound() -> None:
    net = Outputs(mixtral()).eval()
    simulated = calibrated(net, Plan.preset("w4a16", net, IDS, sites={"model.lm_head.*": "float"}), [IDS])
    with torch.no_grad():
        assert torch.allclose(convert(simulated)(IDS), simulated(IDS), atol=1e-5)


def test_experts_that_no_token_reached_are_reported() -> None:
    net = Outputs(mixtral()).eval()
    prepared = prepare(net, Plan.preset("w8a8", net, IDS))
    found = calibrate(prepared, [IDS[:1, :1]])  # one token, two experts per layer
    assert len(found) == 8
    assert all(name.startswith("model.model.layers.") and ".experts: expert " in name for name in found)
    assert prepared(IDS).isfinite().all()
