"""The one spelling of a spec: parse and print, what is refused and why, and the shapes of scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import NumericsError, SpecError
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.spec import Granularity, QuantSpec

granularities = st.one_of(
    st.sampled_from([Granularity(), Granularity("channel")]),
    st.integers(2, 4096).map(lambda size: Granularity("group", size)),
)


@st.composite
def specs(draw: st.DrawFn, depth: int = 2) -> QuantSpec:
    fmt = draw(st.sampled_from(list(FORMATS.values())))
    symmetric = draw(st.booleans()) or not fmt.is_integer
    if depth and fmt.is_scaled and draw(st.booleans()):
        return QuantSpec(fmt, draw(granularities), symmetric, False, draw(specs(depth - 1)))
    dynamic = depth == 2 and not fmt.fit and draw(st.booleans())
    kind = draw(st.one_of(granularities, st.just(Granularity("token"))) if dynamic else granularities)
    return QuantSpec(fmt, kind, symmetric, dynamic)


@given(specs())
def test_a_printed_spec_reads_back_as_itself(spec):
    assert QuantSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "int8/channel",
        "uint8/asym",
        "int4/group128",
        "int8/token/dynamic",
        "uint8/token/asym/dynamic",
        "nf4/group64/scale(int8/group256)",
        "int4/group16/scale(int4/group8/scale(fp16))",
        "ternary/channel",
        "fp16",
        "fp4/group32/scale(e8m0)",
        "fp4/group16/scale(fp8_e4m3)",
        "kmeans4/channel",
        "quantile4/group64/scale(int8/group256)",
        "apot4/channel",
        "binary/channel",
        "int16/token/dynamic",
    ],
)
def test_a_spelled_spec_prints_as_it_was_spelled(text):
    assert str(QuantSpec.parse(text)) == text


@pytest.mark.parametrize(
    ("name", "text"), [("mxfp4", "fp4/group32/scale(e8m0)"), ("nvfp4", "fp4/group16/scale(fp8_e4m3)")]
)
def test_a_published_name_is_read_and_printed_as_what_it_stands_for(name, text):
    assert str(QuantSpec.parse(name)) == text
    assert QuantSpec.parse(name) == QuantSpec.parse(text)


def test_words_may_come_in_any_order_but_are_printed_in_one():
    assert str(QuantSpec.parse("int8/dynamic/asym/token")) == "int8/token/asym/dynamic"


def test_the_parts_of_a_spec_arrive_where_they_belong():
    spec = QuantSpec.parse("nf4/group64/scale(uint8/group256/asym)")
    assert (spec.format.name, spec.granularity.kind, spec.granularity.size) == ("nf4", "group", 64)
    assert (spec.symmetric, spec.dynamic) == (True, False)
    assert (spec.scale.format.name, spec.scale.granularity.size, spec.scale.symmetric) == ("uint8", 256, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "unknown number format 'int9'"),
        ("", "unknown number format ''"),
        (
            "int8/per_channel",
            "cannot read 'per_channel' in quantization spec 'int8/per_channel'; expected channel, token",
        ),
        ("int8/group", "cannot read 'group' in quantization spec 'int8/group'"),
        ("int8/group-4", "cannot read 'group-4'"),
        ("int8/", "cannot read '' in quantization spec 'int8/'"),
        ("int8/channel/group32", "'int8/channel/group32' names two granularities; keep one"),
        ("int8/group1", "int8/group1: a group holds at least 2 elements; write e.g. group128"),
        ("int8/group0", "int8/group0: a group holds at least 2 elements"),
        ("int8/token", "int8/token: one scale per token exists only at run time; write token/dynamic"),
        ("nf4/asym", "nf4/asym: only integer formats have a zero point; remove asym"),
        ("fp16/asym", "fp16/asym: only integer formats have a zero point"),
        ("int4/scale(int8", "'int4/scale\\(int8': scale\\( is not closed by \\)"),
        ("int4/scale(int8)/asym", "'int4/scale\\(int8\\)/asym': scale\\( is not closed"),
        ("int4/scale(int99)", "unknown number format 'int99'"),
        ("kmeans4/dynamic", "kmeans4/dynamic: the table of kmeans4 is fitted and stored; remove dynamic"),
        ("fp16/scale(int8)", "fp16/scale\\(int8\\): fp16 has no scale that could be quantized; remove scale"),
        ("mxfp4/asym", "unknown number format 'mxfp4'"),
        ("int4/dynamic/scale(int8)", "int4/dynamic/scale\\(int8\\): quantized scales are stored, so neither"),
        ("int4/scale(int8/dynamic)", "int4/scale\\(int8/dynamic\\): quantized scales are stored, so neither"),
    ],
)
def test_a_spec_that_means_nothing_is_refused_and_what_was_asked_is_named(text, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec.parse(text)


@given(st.text(alphabet="int48ufpchael/groupsymdk(0123)", max_size=30))
def test_any_text_is_read_or_refused_with_a_spec_error(text):
    try:
        spec = QuantSpec.parse(text)
    except SpecError:
        return
    assert QuantSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("kind", "shape", "scale_shape", "block_shape"),
    [
        (Granularity(), (4, 6), (1,), (1, 24)),
        (Granularity(), (), (1,), (1, 1)),
        (Granularity("channel"), (4, 3, 2, 2), (4, 1, 1, 1), (4, 12)),
        (Granularity("channel"), (4, 6), (4, 1), (4, 6)),
        (Granularity("channel"), (4,), (4,), (4, 1)),
        (Granularity("token"), (2, 3, 6), (2, 3, 1), (2, 3, 6)),
        (Granularity("group", 3), (4, 6), (4, 2), (4, 2, 3)),
        (Granularity("group", 6), (4, 6), (4, 1), (4, 1, 6)),
    ],
)
def test_shapes_of_scales_and_blocks(kind, shape, scale_shape, block_shape):
    assert kind.scale_shape(shape) == scale_shape
    assert kind.blocks(torch.zeros(shape)).shape == block_shape


def test_a_group_that_does_not_divide_the_row_is_refused_with_sizes_that_do():
    with pytest.raises(
        NumericsError, match=r"group32 needs a last axis divisible by 32, found shape \[8, 40\]"
    ) as error:
        Granularity("group", 32).scale_shape([8, 40])
    assert "use channel or one of [40, 20, 8]" in str(error.value)
    with pytest.raises(NumericsError, match="divisible by 32"):
        Granularity("group", 32).blocks(torch.zeros(8, 40))
    with pytest.raises(NumericsError, match=r"one of \[7\]"):
        Granularity("group", 2).scale_shape([8, 7])
