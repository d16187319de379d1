"""Models of the transformers library: which of their tensors absorb factors, and that they compute the same after."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from decoders import relative
from torch import Tensor, nn

import bitwright as bw
from bitwright.algorithms.awq import awq
from bitwright.algorithms.pipeline import outcomes
from bitwright.algorithms.rotate import rotate
from bitwright.algorithms.scaling import find_points
from bitwright.algorithms.smoothquant import smoothquant
from bitwright.graph.dataflow import call
from nets import one_thread  # noqa: F401

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 50}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}


def shaken(net: nn.Module) -> nn.Module:
    """With norms that are not all ones."""
    torch.manual_seed(1)
    for name, parameter in net.named_parameters():
        if "norm" in name or "ln_" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return net.eval()


def llama(**options: Any) -> nn.Module:
    return shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **HEADS, **options})))


def gpt2() -> nn.Module:
    return shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)))


def gemma() -> nn.Module:
    return shaken(transformers.GemmaForCausalLM(transformers.GemmaConfig(head_dim=8, **{**SIZES, **HEADS})))


def batch(**options: Any) -> dict[str, Any]:
    return {"input_ids": IDS, **options}


def prepared(net: nn.Module, example: dict[str, Any], **options: Any) -> nn.Module:
    observers = {"weight": "minmax", "input": "minmax"}
    return bw.prepare(net, bw.Plan.preset("w8a8", net, example, observers=observers, **options))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_folds_everywhere(cache: bool, attention: str) -> None:
    net, example = llama(attn_implementation=attention), batch(use_cache=cache)
    model = prepared(net, example)
    _, points, refused = find_points(model, example, call)
    assert Counter(point.source.rpartition(".")[2] for point in points) == {
        "input_layernorm": 2,
        "v_proj": 2,
        "post_attention_layernorm": 2,
        "up_proj": 2,
        "norm": 1,
    }
    assert not refused
    for method, options in (
        (smoothquant, {"alpha": 0.5, "search": False}),
        (awq, {"clip": False}),
        (rotate, {"seed": 0}),
    ):
        method(model, [example], call, options)
        with torch.no_grad():
            assert relative(model(**example).logits, net(**example).logits) < 1e-10
    assert torch.equal(model.model.layers[0].input_layernorm.weight, torch.ones(32))


def test_tied_embeddings_are_not_rotated() -> None:
    net = llama(tie_word_embeddings=True)
    [found] = rotate(prepared(net, batch()), [batch()], call, {"seed": 0})
    assert "shares its weight" in found.skipped


def test_gpt2_folds_into_layers_whose_weight_is_stored_turned() -> None:
    net = gpt2()
    model = prepared(net, batch(use_cache=False))
    _, points, refused = find_points(model, batch(use_cache=False), call)
    named = {p.source: p.consumers for p in points}
    assert named["transformer.h.0.ln_1"] == ("transformer.h.0.attn.c_attn",)
    assert named["transformer.h.1.ln_2"] == ("transformer.h.1.mlp.c_fc",)
    assert ("transformer.h.0.mlp.c_proj",) in refused
    smoothquant(model, [batch(use_cache=False)], call, {"alpha": 0.5, "search": False})
    with torch.no_grad():
        assert relative(model(**batch()).logits, net(**batch()).logits) < 1e-10
    assert "shares its weight" in rotate(model, [batch(use_cache=False)], call, {"seed": 0})[0].skipped


def test_norms_that_multiply_by_one_more_than_their_weight_are_found_out() -> None:
    sites = {"model.embed_tokens.*": "float"}
    model = prepared(gemma(), batch(use_cache=False), sites=sites)
    _, points, refused = find_points(model, batch(use_cache=False), call)
    assert {p.source.rpartition(".")[2] for p in points} == {"v_proj", "up_proj"}
    assert sum("changes what the model computes" in reason for reason in refused.values()) == 5


def test_a_smoothed_model_ships_and_its_cache_works() -> None:
    net = llama()
    model = prepared(net, batch(), steps=["smoothquant"])
    bw.calibrate(model, [batch()])
    assert any(not outcome.skipped for outcome in outcomes(model))
    tokens: list[Tensor] = [
        m.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (model, bw.convert(model))
    ]
    assert torch.equal(*tokens)
