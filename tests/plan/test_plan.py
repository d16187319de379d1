"""The plan as a file and as a value: TOML round trip, rules, explanations, and what a damaged file says."""

from __future__ import annotations

import tomllib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import PlanError, SpecError
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.spec import Granularity, QuantSpec
from bitwright.plan.plan import DEFAULT_OBSERVERS, Plan, read_spec
from bitwright.plan.site import Site
from bitwright.plan.target import spelled
from models import Mlp, ResidualCnn, TiedLayers, image


def cnn_plan(**options: object) -> Plan:
    return Plan.preset("w8a8", ResidualCnn(), image(), **options)


def decision(plan: Plan, site: str) -> str:
    return spelled(plan.sites[Site.parse(site)])


# --- round trip ---------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_characters="*?[", exclude_categories=("Cs",)), max_size=12)
sites = st.builds(Site, names, st.sampled_from(["weight", "input", "input.0", "input.1"]))


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    fmt = draw(st.sampled_from(list(FORMATS.values())))
    kind = draw(st.sampled_from([Granularity(), Granularity("channel"), Granularity("group", 64)]))
    return QuantSpec(fmt, kind, draw(st.booleans()) or not fmt.is_integer, draw(st.booleans()) and not fmt.fit)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    chosen = draw(st.dictionaries(sites, st.none() | specs(), max_size=8))
    equal = [(a, b) for a in chosen for b in chosen if a != b and chosen[a] == chosen[b]]
    quantized = [site.path for site, spec in chosen.items() if site.is_weight and spec is not None]
    return Plan(
        draw(st.sampled_from(["cpu", "onnxruntime"])),
        chosen,
        {"weight": draw(st.sampled_from(["mse", "minmax"])), "input": draw(names)},
        {"weight": "lsq", "input": draw(st.sampled_from(["lsq", "lsq+"])), "*.input": "fixed"},
        draw(st.dictionaries(st.sampled_from(quantized), names, max_size=3)) if quantized else {},
        dict(draw(st.lists(st.sampled_from(equal), max_size=3))) if equal else {},
        {site: draw(st.text(st.characters(exclude_categories=("Cs",)), max_size=30)) for site in chosen},
    )


@settings(max_examples=200)
@given(plans())
def test_a_written_plan_reads_back_as_itself(plan):
    text = plan.to_toml()
    tomllib.loads(text)
    assert Plan.from_toml(text) == plan


def test_a_saved_plan_loads_as_itself_and_leaves_no_other_file(tmp_path):
    plan = cnn_plan(observers={"input": "percentile:99.9"}, sites={"layers.1.*weight": "int4/channel"})
    path = tmp_path / "plan.toml"
    plan.save(path)
    assert Plan.load(path) == Plan.load(str(path)) == plan
    assert list(tmp_path.iterdir()) == [path]
    plan.with_sites({"stem.*": "float"}).save(path)
    assert decision(Plan.load(path), "stem.weight") == "float"


def test_the_file_reads_like_the_documented_one():
    plan = Plan.preset("w8a8", Mlp(), torch.randn(1, 16), sites={"2.*": None})
    assert plan.to_toml() == (
        "version = 1\n"
        'target = "cpu"\n'
        "\n"
        "[observers]\n"
        '"weight" = "mse"\n'
        '"input" = "mse"\n'
        "\n"
        "[ranges]\n"
        '"weight" = "lsq"\n'
        '"input" = "lsq"\n'
        "\n"
        "[sites]\n"
        '"0.weight" = "int8/channel"\n'
        '"0.input" = "uint8/asym"\n'
        '"2.weight" = "float"\n'
        '"2.input" = "float"\n'
        '"4.weight" = "float"\n'
        '"4.input" = "float"\n'
        "\n"
        "[folds]\n"
        "\n"
        "[shared]\n"
        "\n"
        "[why]\n"
        '"0.weight" = "preset w8a8"\n'
        '"0.input" = "preset w8a8"\n'
        '"2.weight" = "rule \'2.*\'"\n'
        '"2.input" = "rule \'2.*\'"\n'
        '"4.weight" = "the classifier stays in float by default"\n'
        '"4.input" = "the classifier stays in float by default"\n'
    )


# --- rules ---------------------------------------------------------------------------------------------------


def test_later_rules_win():
    plan = cnn_plan().with_sites({"*.weight": "int4/channel", "stem.*": None, "layers.0.conv1.weight": "int2/channel"})
    assert decision(plan, "stem.weight") == decision(plan, "stem.input") == "float"
    assert decision(plan, "layers.0.conv1.weight") == "int2/channel"
    assert decision(plan, "layers.0.conv2.weight") == "int4/channel"
    assert plan.why[Site("stem", "weight")] == "rule 'stem.*'"
    assert plan.why[Site("layers.0.conv2", "weight")] == "rule '*.weight'"
    assert decision(plan.with_sites({"stem.weight": "int3", "*.weight": "int8"}), "stem.weight") == "int8"


def test_a_rule_may_be_a_text_a_spec_or_none():
    spec = QuantSpec.parse("int4/channel")
    for value in ("int4/channel", spec):
        assert cnn_plan().with_sites({"stem.weight": value}).sites[Site("stem", "weight")] == spec
    for value in ("float", None):
        assert cnn_plan().with_sites({"stem.weight": value}).sites[Site("stem", "weight")] is None
    assert read_spec("float") is read_spec(None) is None


def test_rules_make_a_new_plan_and_leave_the_old_one():
    plan = cnn_plan()
    before = plan.to_toml()
    plan.with_sites({"*": "float"})
    assert plan.to_toml() == before


def test_a_rule_that_matches_nothing_is_answered_with_near_names():
    with pytest.raises(PlanError, match=r"'steem\.weight' matches none of the 24 sites; near names: stem\.weight"):
        cnn_plan().with_sites({"steem.weight": "int4/channel"})
    with pytest.raises(PlanError, match=r"'\*\.bias' matches none"):
        cnn_plan(sites={"*.bias": None})


def test_a_rule_that_cannot_be_read_is_refused():
    with pytest.raises(SpecError, match="unknown number format 'int99'"):
        cnn_plan().with_sites({"*.weight": "int99"})


def test_a_rule_that_splits_a_shared_pair_ends_the_sharing():
    plan = cnn_plan()
    pair = Site("layers.1.down.0", "input"), Site("layers.1.conv1", "input")
    assert plan.shared[pair[0]] == pair[1]
    assert pair[0] not in plan.with_sites({str(pair[1]): "uint4/asym"}).shared
    assert pair[0] in plan.with_sites({"layers.1.*.input": "uint4/asym"}).shared


def test_a_rule_that_keeps_a_layer_in_float_ends_its_fold():
    plan = cnn_plan()
    assert plan.folds["stem"] == "bn"
    assert "stem" not in plan.with_sites({"stem.*": "float"}).folds
    assert "stem" in plan.with_sites({"stem.weight": "int4/channel"}).folds


# --- explanations -----------------------------------------------------------------------------------------------


def test_explanations_say_decision_reason_range_sharing_and_fold():
    plan = cnn_plan(observers={"weight": "minmax", "input": "percentile:99.9"})
    assert (
        plan.explain("stem.weight")
        == "stem.weight: int8/channel\n  why: preset w8a8\n  range: minmax\n  in training: lsq\n  holds batch norm bn"
    )
    assert plan.explain(Site("layers.1.down.0", "input")) == (
        "layers.1.down.0.input: uint8/asym\n  why: preset w8a8\n  range: percentile:99.9\n"
        "  in training: lsq\n  shares the quantizer of layers.1.conv1.input"
    )
    assert plan.explain("fc.weight") == "fc.weight: float\n  why: the classifier stays in float by default"
    dynamic = Plan.preset("w8a8-dynamic", Mlp(), torch.randn(1, 16))
    assert dynamic.explain("0.input") == "0.input: int8/token/dynamic\n  why: preset w8a8-dynamic"
    tied = Plan.preset("w8a8", TiedLayers(), torch.randn(1, 8))
    assert "shares the quantizer of a.weight" in tied.explain("b.weight")


def test_observers_are_chosen_per_site_and_the_last_line_wins():
    plan = cnn_plan(
        observers={"input": "percentile:99.9", "layers.*.conv2.input": "minmax", "*1.conv2.*put": "mse:low=0"}
    )
    found = {name: plan.observer(Site(name, "input")) for name in ("stem", "layers.0.conv2", "layers.1.conv2")}
    assert found == {"stem": "percentile:99.9", "layers.0.conv2": "minmax", "layers.1.conv2": "mse:low=0"}
    assert plan.observer(Site("layers.1.conv2", "weight")) == "mse"
    assert "\n  range: mse:low=0\n" in plan.explain("layers.1.conv2.input")
    assert Plan.from_toml(plan.to_toml()) == plan


def test_an_explanation_is_for_one_site_that_exists():
    with pytest.raises(PlanError, match=r"'stem\.wait' matches none of the 24 sites; near names: stem\.weight"):
        cnn_plan().explain("stem.wait")
    with pytest.raises(PlanError, match=r"'stem\.\*' selects 2 sites \(stem\.weight, stem\.input, \.\.\.\); name one"):
        cnn_plan().explain("stem.*")


# --- files written by hand -----------------------------------------------------------------------------------------

HEAD = 'version = 1\ntarget = "cpu"\n'


def test_a_file_may_hold_glob_lines_which_override_the_lines_above_them():
    plan = Plan.from_toml(
        HEAD
        + """
        [sites]
        "a.weight" = "int8/channel"
        "b.weight" = "int8/channel"
        "*.weight" = "int4/channel"
        "c.weight" = "int8/channel"
        "[ab].weight" = "int3/channel"
        "b.weight" = "float"
        """.replace('"b.weight" = "float"', "")
    )
    assert [decision(plan, f"{name}.weight") for name in "abc"] == ["int3/channel", "int3/channel", "int8/channel"]
    assert plan.why[Site("a", "weight")] == "rule '[ab].weight'"


def test_a_glob_line_between_the_sites_loses_no_structure():
    plan = Plan.from_toml(
        HEAD
        + """
        [sites]
        "a.input" = "uint8/asym"
        "*.input" = "int8"
        "b.input" = "int8"
        "b.weight" = "int8/channel"
        [folds]
        "b" = "norm"
        [shared]
        "b.input" = "a.input"
        """
    )
    assert plan.folds == {"b": "norm"}
    assert plan.shared == {Site("b", "input"): Site("a", "input")}


def test_what_a_file_leaves_out_has_defaults():
    plan = Plan.from_toml('version = 1\n[sites]\n"a.weight" = "int8"\n[observers]\ninput = "minmax"\n')
    assert plan.target == "cpu"
    assert plan.observers == {"weight": "mse", "input": "minmax"}
    assert plan.folds == plan.shared == plan.why == {}
    assert DEFAULT_OBSERVERS == {"weight": "mse", "input": "mse"}


DAMAGED = {
    "cut off": ('version = 1\n[sites]\n"a.wei', "not a TOML text|Unterminated|Expected"),
    "twice the same line": (HEAD + '[sites]\n"a.weight" = "int8"\n"a.weight" = "int4"\n', "overwrite"),
    "version missing": ("[sites]\n", "expected version = 1 .* found version = None"),
    "other version": ("version = 2\n", "found version = 2 and no other tables"),
    "other table": (
        HEAD + "[site]\n[sits]\n",
        "the tables observers, ranges, sites, folds, shared, why, steps; found .* and site, sits",
    ),
    "steps are one table": (HEAD + '[steps]\nname = "bias_correction"\n', r"written as \[\[steps\]\]"),
    "unknown step": (HEAD + '[[steps]]\nname = "bias_corection"\n', "did you mean 'bias_correction'"),
    "step without name": (HEAD + "[[steps]]\nalpha = 1\n", "a step is a name or a table with a name"),
    "unknown option": (HEAD + '[[steps]]\nname = "bias_correction"\nalpha = 1\n', "has no option 'alpha'"),
    "empty": ("", "found version = None"),
    "unknown target": ('version = 1\ntarget = "tpu"\n', "unknown target 'tpu'; known targets: cpu, onnxruntime"),
    "target is a number": ("version = 1\ntarget = 5\n", "unknown target 5"),
    "unknown spec": (HEAD + '[sites]\n"a.weight" = "int99"\n', "unknown number format 'int99'"),
    "unknown slot": (HEAD + '[sites]\n"a.bias" = "int8"\n', "'a.bias' is not a site; a site ends in"),
    "value is a number": (HEAD + '[sites]\n"a.weight" = 8\n', r'\[sites\] must hold lines of the form "key" = "text"'),
    "unquoted dots": (HEAD + "[sites]\na.weight = 'int8'\n", r"\[sites\] must hold lines of the form"),
    "table is a list": (HEAD + "sites = []\n", r"\[sites\] must hold lines"),
    "pattern without sites": (HEAD + '[sites]\n"*.weight" = "int8"\n', r"'\*\.weight' matches none of the 0 sites"),
    "shared with nobody": (
        HEAD + '[sites]\n"a.input" = "int8"\n[shared]\n"a.input" = "b.input"\n',
        r"\[shared\] names b\.input, which is not in \[sites\]",
    ),
    "fold of nothing": (
        HEAD + '[sites]\n"a.weight" = "int8"\n[folds]\n"b" = "bn"\n',
        r"\[folds\] names b\.weight, which is not in \[sites\]",
    ),
    "shared is no site": (HEAD + '[shared]\n"a" = "b"\n', "'a' is not a site"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_its_path_and_the_reason(name, tmp_path):
    text, reason = DAMAGED[name]
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=reason) as error:
        Plan.load(path)
    assert str(error.value).startswith(f"cannot read plan {path}: ")


def test_a_file_that_is_missing_or_no_text_is_refused_with_its_path(tmp_path):
    with pytest.raises(PlanError, match=r"cannot read plan .*missing\.toml: .*No such file"):
        Plan.load(tmp_path / "missing.toml")
    with pytest.raises(PlanError, match=r"cannot read plan .*Is a directory"):
        Plan.load(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"cannot read plan .*bytes\.toml"):
        Plan.load(tmp_path / "bytes.toml")


@given(st.text(max_size=60))
def test_any_text_is_a_plan_or_a_plan_error(text):
    try:
        plan = Plan.from_toml(HEAD + text)
    except (PlanError, SpecError):
        return
    assert Plan.from_toml(plan.to_toml()) == plan
