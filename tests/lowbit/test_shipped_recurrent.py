from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from bitwright.errors import ExportError, KernelError
from bitwright.export.onnx import export
from bitwright.flow.convert import convert
from bitwright.kernels import cpu, table
from bitwright.lowbit import recurrent
from bitwright.lowbit.linear import LowbitLinear
from bitwright.lowbit.recurrent import LowbitGRU, LowbitLSTM
from nets import calibrated, layer_plan


def shipped(layer: nn.Module, x: Any, weight: str = "int8/channel", input: str | None = "uint8/asym") -> Any:
    return convert(calibrated(layer, layer_plan(layer, weight, input), [x]))


@pytest.mark.parametrize(("cls", "form"), [(nn.LSTM, LowbitLSTM), (nn.GRU, LowbitGRU)])
def test_it_is_close_to_the_float_layer(cls: type[nn.LSTM], form: type[nn.Module]) -> None:
    layer, x = cls(8, 12, 2, bidirectional=True, batch_first=True), torch.randn(4, 6, 8)
    low = shipped(layer, x)
    assert type(low) is form
    for found, expected in zip(tree_leaves(low(x)), tree_leaves(layer(x)), strict=True):
        assert found.shape == expected.shape
        assert 0 < (found - expected).abs().max() < 0.05


def test_ragged_sequences_are_not_touched_by_their_neighbours() -> None:
    layer, parts = nn.LSTM(8, 12, bidirectional=True), [torch.randn(n, 8) for n in (3, 6, 1)]
    packed = pack_sequence(parts, enforce_sorted=False)
    low = shipped(layer, packed)
    out, (h, c) = low(packed)
    assert isinstance(out, PackedSequence)
    padded, lengths = pad_packed_sequence(out)
    assert lengths.tolist() == [3, 6, 1]
    for i, part in enumerate(parts):
        alone, (h_alone, c_alone) = low(part)
        assert torch.equal(padded[: len(part), i], alone)
        assert torch.equal(h[:, i], h_alone)
        assert torch.equal(c[:, i], c_alone)


def test_every_product_has_a_kernel_of_its_specs() -> None:
    layer, x = nn.GRU(8, 12, 2), torch.randn(6, 4, 8)
    low = shipped(layer, x, "int4/channel")
    parts = {name: part for name, part in low.named_children() if isinstance(part, LowbitLinear)}
    assert list(parts) == ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]
    for part in parts.values():
        assert part.packed.shape[1] * 2 == part.shape[1]
        assert part.kernel.name == table.select("linear", part.weight_spec, part.input_spec, part.shape, _best()).name
    text = repr(low)
    assert "LowbitGRU" in text
    assert "8, 12, num_layers=2" in text
    assert "(weight_hh_l1): LowbitLinear([36, 12], weight=int4/channel, input=uint8/asym" in text


def _best() -> frozenset[str]:
    return cpu.cpu_features()


def test_a_weight_without_an_integer_kernel_is_decoded_once_per_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.LSTM(8, 12), torch.randn(6, 4, 8)
    low = convert(calibrated(layer, layer_plan(layer, "nf4/channel"), []), features=frozenset())
    expected, count = low(x)[0], 0
    decode = recurrent.dequantize

    def counted(weight: Any) -> Tensor:
        nonlocal count
        count += 1
        return decode(weight)

    monkeypatch.setattr(recurrent, "dequantize", counted)
    assert torch.equal(low(x)[0], expected)
    assert count == 2


def test_shapes_that_do_not_fit_are_named() -> None:
    layer, x = nn.GRU(8, 12), torch.randn(6, 4, 8)
    low = shipped(layer, x)
    with pytest.raises(KernelError, match=r"this GRU takes sequences .* with 8 features, got \[6, 4, 5\]"):
        low(torch.randn(6, 4, 5))
    with pytest.raises(KernelError, match=r"this GRU takes states of \[\[1, 4, 12\]\], got \[\[4, 12\]\]"):
        low(x, torch.zeros(4, 12))


def test_onnx_export_names_the_layer(tmp_path: Any) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 12, batch_first=True))
    x = torch.randn(4, 6, 8)
    with pytest.raises(ExportError, match=r"1: LowbitLSTM has no ONNX form; set its sites to 'float'"):
        export(convert(calibrated(net, "w8a8", [x])), tmp_path / "net.onnx", x)
