"""`coverage` accounts for every tensor and every byte of a converted model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bitwright.bench.measure import model_bytes
from bitwright.errors import BitwrightError
from bitwright.flow.checkpoint import save
from bitwright.flow.convert import convert
from bitwright.flow.coverage import coverage
from models import EmbeddingNet, Mlp, ResidualCnn, TiedLayers, image, with_statistics
from nets import calibrated, one_thread  # noqa: F401

MODELS = {
    "cnn": (lambda: with_statistics(ResidualCnn()), "w4a4", lambda: image(4)),
    "mlp": (Mlp, "w8a8", lambda: torch.randn(4, 16)),
    "weight only": (Mlp, "w4a16", lambda: torch.randn(4, 16)),
    "embedding": (EmbeddingNet, "w8a8", lambda: torch.randint(20, (2, 6))),
    "tied": (TiedLayers, "w8a8", lambda: torch.randn(4, 8)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_bytes_add_up_to_the_model_and_to_the_file(kind: str, tmp_path: Path) -> None:
    make, preset, example = MODELS[kind]
    shipped = convert(calibrated(make(), preset, [example()]))
    rows = coverage(shipped)
    total = sum(row.bytes for row in rows)
    assert total == model_bytes(shipped)
    save(shipped, tmp_path / "model")
    raw = (tmp_path / "model" / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    stored = {name: entry for name, entry in json.loads(raw[8 : 8 + header]).items() if name != "__metadata__"}
    assert len(raw) - 8 - header == total
    assert sum(end - start for start, end in (entry["data_offsets"] for entry in stored.values())) == total


def test_every_tensor_has_a_row_with_its_format_and_the_reason() -> None:
    net = with_statistics(ResidualCnn())
    rows = {row.path: row for row in coverage(convert(calibrated(net, "w4a4", [image(4)])))}
    layers = {name: m for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for name, module in layers.items():
        row = rows[f"{name}.weight"]
        assert row.elements == module.weight.numel()
        assert row.why
        expected = "float" if name == "fc" else "int8/channel" if name == "stem" else "int4/channel"
        assert row.format == expected
    assert rows["fc.weight"].why == "the classifier stays in float by default"
    assert rows["stem.weight"].why == "preset w4a4: a layer that sees the raw input keeps 8 bits"
    assert rows["stem.bias"].why == "biases stay float"
    assert rows["layers.0.add_0"].input == "uint8/asym, uint8/asym"
    assert not [name for name in rows if "bn" in name or "norm" in name]  # they are inside the convolutions


def test_tied_weights_are_counted_once() -> None:
    rows = {row.path: row for row in coverage(convert(calibrated(TiedLayers(), "w8a8", [torch.randn(4, 8)])))}
    assert (
        rows["a.weight"].bytes - rows["b.weight"].bytes == 8 * 8 + 8 * 4
    )  # codes and scales; each keeps its input range


def test_a_float_model_has_no_coverage() -> None:
    with pytest.raises(BitwrightError, match="Mlp was not prepared"):
        coverage(Mlp())
