"""The KL threshold: known cases, invariances, and the `kl` observer (algorithms.md 3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitwright.numerics.affine import simulate
from bitwright.numerics.spec import QuantSpec
from bitwright.observe.entropy import threshold_bins
from bitwright.observe.observer import Kl, Mse, make_observer


def plain(counts: np.ndarray, levels: int) -> int:
    """The published rule, bin by bin."""
    counts = counts.astype(float).copy()
    counts[0] = counts[1]
    found = []
    for i in range(max(128, levels), len(counts) + 1):
        p, source = counts[:i].copy(), counts[:i]
        p[-1] += counts[i:].sum()
        level = np.digitize(np.arange(i), np.linspace(0, i, levels + 1)) - 1
        q = np.zeros(i)
        for number in range(levels):
            cell = (level == number) & (source > 0)
            if cell.any():
                q[cell] = source[level == number].sum() / cell.sum()
        p, q = p / p.sum(), q / q.sum()
        some = p > 0
        with np.errstate(divide="ignore"):
            found.append(np.sum(p[some] * np.log(p[some] / q[some])))
    return len(counts) - int(np.argmin(found[::-1]))


def magnitudes(x: torch.Tensor, bins: int) -> torch.Tensor:
    return torch.histc(x.abs(), bins, 0, x.abs().max().item())


@pytest.mark.parametrize(("levels", "bins"), [(128, 512), (32, 400), (256, 512)])
def test_the_threshold_is_that_of_the_rule_written_out(levels, bins):
    for x in (torch.randn(20_000), torch.randn(5000) ** 3):
        counts = magnitudes(x, bins)
        assert threshold_bins(counts, levels) == plain(counts.numpy(), levels)


def test_a_uniform_histogram_is_not_clipped():
    for levels in (32, 128, 256):
        assert threshold_bins(torch.ones(2048), levels) == 2048


def test_scaling_the_histogram_changes_nothing_and_nothing_is_written_into_it():
    counts = magnitudes(torch.randn(50_000), 2048)
    before = counts.clone()
    found = threshold_bins(counts, 128)
    assert torch.equal(counts, before)
    assert threshold_bins(counts * 1000, 128) == threshold_bins(counts * 0.01, 128) == found
    assert threshold_bins(counts, 128) == found


def test_zeros_behind_a_relu_do_not_decide():
    counts = magnitudes(torch.randn(50_000), 2048)
    many = counts.clone()
    many[0] += 1_000_000
    assert threshold_bins(many, 256) == threshold_bins(counts, 256)


@pytest.mark.parametrize("counts", [torch.tensor([5.0]), torch.tensor([5.0, 0.0]), torch.zeros(300)])
def test_histograms_with_next_to_nothing_in_them_are_not_clipped(counts):
    assert threshold_bins(counts, 128) == len(counts)


def fed(text: str, *batches: torch.Tensor):
    observer = make_observer(text)
    for batch in batches:
        observer.update(batch)
    return observer


def test_rare_outliers_are_clipped_and_the_body_is_not():
    x = torch.cat([torch.randn(200_000), torch.full((3,), 60.0)])
    scale = fed("kl", x).qparams(QuantSpec.parse("int8")).scale.item()
    assert 2.5 < scale * 127 < 30
    wide = fed("minmax", x).qparams(QuantSpec.parse("int8")).scale.item()
    assert wide * 127 == pytest.approx(60, rel=1e-5)


@pytest.mark.parametrize("text", ["int8", "uint8/asym", "int6", "uint7"])
@pytest.mark.parametrize("data", [torch.zeros(100), torch.full((50,), 3.0), torch.linspace(-1, 1, 99_999)])
def test_odd_data_keeps_its_range(text, data):
    spec = QuantSpec.parse(text)
    params = fed("kl", data).qparams(spec)
    x = data.clamp(min=0) if text == "uint7" else data
    assert (simulate(x, spec, params) - x).abs().max() <= params.scale / 2 * 1.01


def test_an_asymmetric_range_is_cut_by_the_threshold_on_either_side_only_where_data_is():
    spec = QuantSpec.parse("uint8/asym")
    params = fed("kl", torch.nn.functional.gelu(torch.randn(100_000))).qparams(spec)
    low, high = -params.zero_point * params.scale, (255 - params.zero_point) * params.scale
    assert low.item() == pytest.approx(-0.17, abs=params.scale.item())
    assert 2 < high.item() < 4.6


@pytest.mark.parametrize("text", ["int5", "uint4/asym", "nf4", "ternary"])
def test_below_six_bits_and_for_tables_the_answer_is_that_of_least_squares(text):
    x, spec = torch.randn(5000), QuantSpec.parse(text)
    found, wanted = (fed(name, x).qparams(spec) for name in ("kl", "mse"))
    assert torch.equal(found.scale, wanted.scale)
    assert isinstance(make_observer("kl"), Kl)
    assert isinstance(make_observer("mse"), Mse)
