"""What ONNX export does with volume convolutions, and what it says about layers it does not cover."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import ExportError
from bitwright.export.onnx import export
from bitwright.flow.convert import convert
from bitwright.plan.plan import Plan
from nets import calibrated, one_thread  # noqa: F401

pytest.importorskip("onnxruntime")


def shipped(layer: nn.Module, x: Tensor, rules: dict[str, str]) -> nn.Module:
    net = nn.Sequential(layer, nn.ReLU())
    return convert(calibrated(net, Plan.preset("w8a8", net, x, sites=rules), [x]))


@pytest.mark.parametrize("input", ["uint8/asym", "uint8/asym/dynamic", "float"])
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_a_volume_convolution_runs_in_onnx_runtime(input: str, mode: str, tmp_path: Path) -> None:
    import onnxruntime

    layer, x = nn.Conv3d(4, 6, (1, 2, 3), (1, 2, 1), (0, 1, 1), groups=2, padding_mode=mode), torch.randn(2, 4, 4, 5, 3)
    model = shipped(layer, x, {"0.input": input})
    export(model, tmp_path / "m.onnx", x)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", options)
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-5)


UNCOVERED: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "ConvTranspose": (lambda: nn.ConvTranspose2d(4, 6, 3), torch.zeros(2, 4, 5, 5)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 8), torch.zeros(2, 3, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_layers_without_an_onnx_form_are_named(name: str, tmp_path: Path) -> None:
    make, x = UNCOVERED[name]
    model = shipped(make(), x, {})
    with pytest.raises(ExportError, match=f"0: Lowbit{name} has no ONNX form; set its sites to 'float'"):
        export(model, tmp_path / "m.onnx", x)
    assert not (tmp_path / "m.onnx").exists()


def test_the_onnx_target_keeps_what_it_cannot_run_in_float() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    plan = Plan.preset("w8a8", net, torch.zeros(2, 4, 5, 5), target="onnxruntime")
    specs = {str(site): spec for site, spec in plan.sites.items()}
    assert specs["0.weight"] is None
    assert specs["2.weight"] is not None
    assert "target onnxruntime has no conv_transpose kernel" in plan.explain("0.weight")
