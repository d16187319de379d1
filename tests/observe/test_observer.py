"""Observers: known answers on Gaussian data, running averages, percentiles, spelling (algorithms.md 2.8 and 3)."""

from __future__ import annotations

import math

import pytest
import torch

from bitwright.errors import CalibrationError, NumericsError, SpecError
from bitwright.numerics.affine import choose_qparams, simulate
from bitwright.numerics.spec import QuantSpec
from bitwright.observe.observer import OBSERVERS, Observer, make_observer, register_observer

UINT8 = QuantSpec.parse("uint8/asym")
NAMES = ["minmax", "ema", "ema:0.5", "percentile", "percentile:99.9", "mse", "kl"]


def fed(text: str, *batches: torch.Tensor) -> Observer:
    observer = make_observer(text)
    for batch in batches:
        observer.update(batch)
    return observer


@pytest.fixture(scope="module")
def million() -> torch.Tensor:
    return torch.randn(1_000_000, generator=torch.Generator().manual_seed(5))


# Clipping point and error of the best uniform quantizer of N(0, 1): alpha* = |qmin| s, SQNR in dB.
GAUSSIAN = {
    "ternary": (1.224, 7.21),
    "int2": (2.097, 8.26),
    "int3": (2.407, 13.91),
    "int4": (2.709, 19.26),
    "int5": (3.021, 24.53),
    "int6": (3.334, 29.82),
    "int8": (3.938, 40.57),
}


@pytest.mark.parametrize("name", GAUSSIAN)
def test_mse_finds_the_gaussian_optimum(name, million):
    alpha, decibel = GAUSSIAN[name]
    spec = QuantSpec.parse(name)
    params = fed("mse", *million.split(100_000)).qparams(spec)
    assert -spec.format.qmin * params.scale.item() == pytest.approx(alpha, rel=0.03)
    error = (simulate(million, spec, params) - million).double().square().mean()
    assert 10 * math.log10(million.double().square().mean() / error) == pytest.approx(decibel, abs=0.1)


def test_mse_on_a_histogram_is_as_good_as_on_the_values(million):
    x = million[:20_000].relu()
    for text in ("uint2/asym", "uint4/asym"):
        spec = QuantSpec.parse(text)
        seen = fed("mse", x).qparams(spec)
        errors = [
            (simulate(x, spec, params) - x).square().sum().item()
            for params in (seen, choose_qparams(x.min().view(1), x.max().view(1), spec))
        ]
        assert errors[0] < errors[1] * 0.7


def test_minmax_takes_the_extremes_of_everything_it_saw():
    params = fed("minmax", torch.tensor([[1.0, -0.5]]), torch.tensor([2.0]), torch.tensor([0.0])).qparams(UINT8)
    wanted = choose_qparams(torch.tensor([-0.5]), torch.tensor([2.0]), UINT8)
    assert torch.equal(params.scale, wanted.scale)
    assert torch.equal(params.zero_point, wanted.zero_point)


def test_an_average_of_a_constant_stream_is_the_constant_from_the_first_batch_on():
    observer = make_observer("ema:0.9")
    for _ in range(5):
        observer.update(torch.tensor([-1.0, 3.0]))
        assert observer.range.tolist() == pytest.approx([-1, 3], rel=1e-6)


@pytest.mark.parametrize(("text", "decay"), [("ema", 0.99), ("ema:0.9", 0.9), ("ema:0.5", 0.5)])
def test_an_average_answers_a_step_with_one_minus_decay_to_the_n(text, decay):
    observer = fed(text, torch.zeros(4))
    for n in range(1, 101):
        observer.update(torch.tensor([0.0, 1.0]))
        if n in (1, 10, 69, 100):
            assert observer.qparams(UINT8).scale.item() * 255 == pytest.approx(1 - decay**n, rel=1e-4)


def test_percentiles_of_a_known_ramp():
    x = torch.arange(-5000, 5001) / 5000.0  # 10 001 values, evenly spread
    params = fed("percentile:99", x[torch.randperm(len(x))]).qparams(UINT8)
    assert params.scale.item() * 255 == pytest.approx(2 * 0.99, abs=2e-3)
    assert params.zero_point.item() == pytest.approx(127.5, abs=1)


def test_percentiles_cut_outliers_that_minmax_keeps():
    x = torch.randn(100_000)
    x[:5] = 1000.0
    wide, tight = (fed(name, x).qparams(UINT8).scale.item() * 255 for name in ("minmax", "percentile:99.9"))
    assert wide > 1000
    assert tight == pytest.approx(2 * 3.29, rel=0.03)


def test_the_hundredth_percentile_is_the_extremes_exactly():
    x = torch.randn(12_345)
    whole, wide = fed("percentile:100", *x.split(1000)).qparams(UINT8), fed("minmax", x).qparams(UINT8)
    assert torch.equal(whole.scale, wide.scale)
    assert torch.equal(whole.zero_point, wide.zero_point)


@pytest.mark.parametrize("name", NAMES)
def test_all_observers_answer_with_one_scale_that_is_exact_on_a_constant_batch(name):
    params = fed(name, torch.full((3, 4), 2.0, dtype=torch.float16)).qparams(UINT8)
    assert params.scale.shape == params.zero_point.shape == (1,)
    assert params.scale.dtype == torch.float32
    assert simulate(torch.tensor([2.0]), UINT8, params).item() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_zeros_before_data_do_no_harm(name):
    observer = fed(name, torch.zeros(8, 8), torch.randn(64) * 100)
    scale = observer.qparams(UINT8).scale.item()
    assert 1e-3 < scale < 10


@pytest.mark.parametrize("name", NAMES)
def test_batches_without_values_change_nothing(name):
    x = torch.randn(100)
    full = fed(name, torch.zeros(0, 3), x, torch.zeros(0)).qparams(UINT8)
    assert torch.equal(full.scale, fed(name, x).qparams(UINT8).scale)


@pytest.mark.parametrize("name", NAMES)
def test_an_observer_that_saw_nothing_says_so_instead_of_inventing_a_scale(name):
    observer = fed(name, torch.zeros(0))
    observer.reduce()
    with pytest.raises(CalibrationError, match="this observer saw no values"):
        observer.qparams(UINT8)


@pytest.mark.parametrize("name", ["minmax", "ema"])
def test_a_nan_that_reaches_an_observer_is_not_swallowed(name):
    with pytest.raises(NumericsError, match="uint8/asym: a range bound is NaN"):
        fed(name, torch.tensor([1.0, math.nan])).qparams(UINT8)


@pytest.mark.parametrize("name", NAMES)
def test_updates_do_not_keep_the_tensor_or_its_graph(name):
    x = torch.randn(10, requires_grad=True)
    observer = fed(name, x * 2)
    assert not observer.qparams(UINT8).scale.requires_grad


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max", "unknown observer 'max'; known observers: ema, fixed, kl, minmax, mse, percentile"),
        ("", "unknown observer ''; known observers"),
        ("entropy:3", "unknown observer 'entropy:3'"),
        ("percentile:abc", "cannot read observer 'percentile:abc': could not convert string to float"),
        ("percentile:50", "cannot read observer 'percentile:50': the percentile must lie above 50.*got 50.0"),
        ("percentile:100.1", "at most at 100, got 100.1"),
        ("percentile:nan", "cannot read observer 'percentile:nan'"),
        ("ema:1", "cannot read observer 'ema:1': the decay must lie between 0 and 1, got 1.0"),
        ("ema:0", "the decay must lie between 0 and 1, got 0.0"),
        ("minmax:3", "cannot read observer 'minmax:3'"),
        ("mse:2", "the lower end must be finite and at most 0, got 2.0"),
        ("mse:high=2", "cannot read observer 'mse:high=2'"),
        ("fixed:1,0", "the lower end must lie below the upper one, got 1.0 and 0.0"),
        ("fixed:1", "cannot read observer 'fixed:1'"),
    ],
)
def test_unknown_observers_and_unreadable_numbers_are_named(text, message):
    with pytest.raises(SpecError, match=message):
        make_observer(text)


def test_arguments_reach_the_observer():
    assert make_observer("percentile").tail == pytest.approx(0.00005)
    assert make_observer("percentile:99.9").tail == pytest.approx(0.0005)
    assert make_observer("ema:0.7").decay == 0.7


def test_a_registered_observer_is_known_by_its_name_and_cannot_be_replaced_silently():
    @register_observer("test-constant")
    class Constant:
        def __init__(self, value: float = 1.0) -> None:
            self.value = value

    try:
        assert make_observer("test-constant:7").value == 7.0
        with pytest.raises(SpecError, match="observer 'test-constant' is registered already"):
            register_observer("test-constant")(Constant)
    finally:
        del OBSERVERS["test-constant"]


def test_a_known_lower_end_is_kept_and_the_upper_one_searched():
    y = torch.nn.functional.gelu(torch.randn(200_000))
    for text in ("uint4/asym", "uint8/asym"):
        spec = QuantSpec.parse(text)
        params = fed("mse:low=-0.169971", y).qparams(spec)
        low = -params.zero_point * params.scale
        assert low.item() == pytest.approx(-0.169971, abs=params.scale.item() / 2 * 1.01)
        free = fed("mse", y).qparams(spec)
        errors = [(simulate(y, spec, p) - y).double().square().mean().item() for p in (params, free)]
        assert abs(10 * math.log10(errors[0] / errors[1])) < 0.05  # dB: the search finds that end by itself


@pytest.mark.parametrize("text", ["mse:low=-0.169971", "fixed:-0.1,5", "fixed:-1,2"])
def test_data_beyond_an_end_that_was_called_known_is_an_error(text):
    with pytest.raises(CalibrationError, match=f"observer {text} fixes an end that the data passes: found 3"):
        fed(text, torch.tensor([-3.0 if text != "fixed:-1,2" else 3.0, 1.0])).qparams(UINT8)


def test_a_fixed_range_is_taken_whatever_the_data():
    params = fed("fixed:0,1", torch.rand(10) * 0.3).qparams(UINT8)
    assert params.scale.item() * 255 == pytest.approx(1.0)
    assert params.zero_point.item() == 0
    assert fed("fixed:-1,1", torch.tensor([1.001])).qparams(
        QuantSpec.parse("int8")
    ).scale.item() * 127 == pytest.approx(1.0)
