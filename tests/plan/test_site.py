"""Addresses of tensors, glob patterns over them, and models that cannot be prepared at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from bitwright.errors import ModelError, PlanError
from bitwright.graph.calls import Add
from bitwright.plan.site import ADD_SLOTS, Site, check_preparable, matching, operator_of, unknown_subclass
from models import ActivatedNorm, Mlp

ALL_SLOTS = [
    *ADD_SLOTS,
    "weight",
    "input",
    "weight_ih_l0",
    "weight_hh_l1_reverse",
    "hidden_l0",
    "in_proj_weight",
    "query",
]


@given(path=st.text(max_size=20), slot=st.sampled_from(ALL_SLOTS))
def test_a_printed_site_reads_back_as_itself(path, slot):
    assert Site.parse(str(Site(path, slot))) == Site(path, slot)


@pytest.mark.parametrize(
    ("text", "path", "slot"),
    [
        ("fc.weight", "fc", "weight"),
        ("weight", "", "weight"),
        ("input.0", "", "input.0"),
        ("a.b.add_0.input.1", "a.b.add_0", "input.1"),
        ("input.weight", "input", "weight"),
        ("a.input.input", "a.input", "input"),
    ],
)
def test_a_site_is_split_at_its_slot(text, path, slot):
    assert Site.parse(text) == Site(path, slot)
    assert str(Site(path, slot)) == text


@pytest.mark.parametrize("text", ["fc", "fc.bias", "fc.weights", "fc.input.x", "", "myweight"])
def test_text_that_ends_in_no_slot_is_refused(text):
    with pytest.raises(
        PlanError, match=f"{text!r} is not a site; a site ends in a slot such as .weight, .input or .input.0"
    ):
        Site.parse(text)


def test_only_weights_are_stored():
    assert Site("a", "weight").is_weight
    assert not Site("a", "input").is_weight
    assert not Site("a", "input.0").is_weight


SITES = [
    Site.parse(t) for t in ("stem.weight", "stem.input", "layers.0.fc.weight", "layers.10.fc.weight", "add_0.input.1")
]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*", 5),
        ("*.weight", 3),
        ("stem.*", 2),
        ("layers.*.weight", 2),
        ("layers.?.fc.weight", 1),
        ("layers.[01].fc.weight", 1),
        ("stem.input", 1),
        ("*.input*", 2),
    ],
)
def test_glob_patterns_select_sites(pattern, count):
    assert len(matching(pattern, SITES)) == count


def test_patterns_are_case_sensitive_and_match_whole_names():
    for pattern in ("STEM.weight", "stem", "weight"):
        with pytest.raises(PlanError, match=f"{pattern!r} matches none of the 5 sites"):
            matching(pattern, SITES)


def test_a_pattern_that_matches_nothing_is_answered_with_near_names():
    with pytest.raises(PlanError, match=r"'stem\.wieght' matches none of the 5 sites; near names: stem\.weight"):
        matching("stem.wieght", SITES)
    with pytest.raises(PlanError, match="'zzz' matches none of the 0 sites; the model has no such sites"):
        matching("zzz", [])


def test_an_exact_name_is_found_even_if_it_looks_like_a_pattern():
    odd = [Site("experts[0]", "weight"), Site("experts0", "weight")]
    assert matching("experts[0].weight", odd) == odd


# --- what a module is ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "operator"),
    [
        (nn.Linear(2, 2), "linear"),
        (nn.Conv1d(2, 2, 1), "conv"),
        (nn.Conv2d(2, 2, 1), "conv"),
        (nn.Embedding(2, 2), "embedding"),
        (Add(), "add"),
        (nn.Conv3d(2, 2, 1), "conv3d"),
        (nn.ConvTranspose2d(2, 2, 1), "conv_transpose"),
        (nn.LSTM(2, 2), "recurrent"),
        (nn.MultiheadAttention(2, 1), "multihead"),
        (nn.LayerNorm(2), None),
    ],
)
def test_operators_of_modules(module, operator):
    assert operator_of(module) == operator
    assert unknown_subclass(module) is None


def test_a_subclass_is_never_taken_for_its_base():
    class Scaled(nn.Linear):
        pass

    assert operator_of(Scaled(2, 2)) is None
    assert unknown_subclass(Scaled(2, 2)) is nn.Linear
    assert unknown_subclass(type("Mine", (nn.MultiheadAttention,), {})(4, 1)) is nn.MultiheadAttention
    assert operator_of(nn.MultiheadAttention(4, 1).out_proj) == "linear"
    assert unknown_subclass(ActivatedNorm(4)) is None


# --- models that cannot be prepared ------------------------------------------------------------------------


def test_lazy_parameters_are_refused():
    with pytest.raises(ModelError, match=r"0\.weight is a lazy parameter without a shape; run one batch"):
        check_preparable(nn.Sequential(nn.LazyLinear(4)))


def test_parameters_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = Mlp()
    with pytest.raises(
        ModelError, match=r"0\.weight is on the meta device and holds no numbers; load its weights first"
    ):
        check_preparable(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_that_are_not_float32_are_refused(dtype):
    model = Mlp()
    model[2].to(dtype)
    with pytest.raises(ModelError, match=rf"2\.weight is {dtype}; codes are defined on float32: call model\.float\(\)"):
        check_preparable(model)


def test_integer_parameters_do_no_harm():
    model = Mlp()
    model.steps = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
    check_preparable(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)]
)
def test_weights_that_a_hook_computes_are_refused(wrap):
    model = Mlp()
    wrap(model[2])
    with pytest.raises(ModelError, match=r"2\.weight is computed by a hook \(weight_norm, spectral_norm or pruning\)"):
        check_preparable(model)


def test_a_pruned_model_is_accepted_once_pruning_is_permanent():
    model = Mlp()
    prune.l1_unstructured(model[2], "weight", 0.5)
    prune.remove(model[2], "weight")
    check_preparable(model)
