"""The kernel table: which row serves, and why the others do not."""

from __future__ import annotations

import pytest
import torch

from bitwright.errors import KernelError
from bitwright.kernels import cpu
from bitwright.kernels.row import Activation
from bitwright.kernels.table import KERNELS, explain, select
from bitwright.numerics.qtensor import quantize
from bitwright.numerics.spec import QParams, QuantSpec

X86 = frozenset({"native", "avx2", "avx512_vnni"})
ALL = X86 | {"neon_dotprod", "neon_i8mm"}
GPU = frozenset({"cuda", "triton"})
SUBSETS = {
    "avx512_vnni": X86,
    "avx2": frozenset({"native", "avx2"}),
    "neon_i8mm": frozenset({"native", "neon_dotprod", "neon_i8mm"}),
    "neon_dotprod": frozenset({"native", "neon_dotprod"}),
    "portable": frozenset({"native"}),
    "reference": frozenset(),
}


def spec(text: str | None) -> QuantSpec | None:
    return None if text is None else QuantSpec.parse(text)


def chosen(op: str, weight: str, input: str | None, features: frozenset[str], shape: tuple[int, ...] = (8, 16)) -> str:
    return select(op, QuantSpec.parse(weight), spec(input), shape, features).name


@pytest.mark.parametrize("isa", SUBSETS)
@pytest.mark.parametrize("op", ["linear", "conv"])
def test_integer_pairs_take_the_best_instruction_set(op: str, isa: str) -> None:
    for weight in ("int8/channel", "int4", "ternary/channel", "int2"):
        for input in ("uint8/asym", "int8", "int8/token/dynamic"):
            assert chosen(op, weight, input, SUBSETS[isa]) == f"{op}/{isa}"


@pytest.mark.parametrize("features", SUBSETS.values(), ids=list(SUBSETS))
@pytest.mark.parametrize(
    ("op", "weight", "input", "name"),
    [
        ("linear", "fp8_e4m3/channel", None, "linear/decode"),
        ("linear", "int3/group16", None, "linear/decode"),
        ("linear", "kmeans4/channel", None, "linear/decode"),
        ("linear", "fp16", "uint8/asym", "linear/decode"),
        ("conv", "fp16", None, "conv/decode"),
        ("embedding", "int8/channel", None, "embedding/gather"),
    ],
)
def test_float_inputs_and_odd_weights_decode(
    op: str, weight: str, input: str | None, name: str, features: frozenset[str]
) -> None:
    assert chosen(op, weight, input, features) == name


@pytest.mark.parametrize("isa", SUBSETS)
@pytest.mark.parametrize(
    "weight", ["int4/channel", "int4/group16", "nf4/channel", "uint8/channel/asym", "int8/group32"]
)
def test_packed_weights_meet_float_inputs_in_native_code(isa: str, weight: str) -> None:
    expected = f"linear/decode/{isa}" if "native" in SUBSETS[isa] else "linear/decode"
    assert chosen("linear", weight, None, SUBSETS[isa]) == expected


@pytest.mark.parametrize("op", ["linear", "conv"])
@pytest.mark.parametrize("weight", ["uint8/channel", "uint4/channel"])
def test_unsigned_weights_do_not_fit_layouts_of_signed_ones(op: str, weight: str) -> None:
    assert chosen(op, weight, "uint8/asym", ALL) == f"{op}/reference"


def test_unsigned_weights_in_groups_do_not_fit_either() -> None:
    assert chosen("linear", "uint4/group32", "uint8/asym", ALL, (8, 64)) == "linear/reference"


def test_sums_that_could_overflow_take_the_reference() -> None:
    assert chosen("linear", "int8", "uint8", ALL, (8, 65536)) == "linear/avx512_vnni"
    assert chosen("linear", "int8", "uint8", ALL, (8, 65537)) == "linear/reference"
    assert chosen("conv", "int8", "uint8", ALL, (8, 8192, 3, 3)) == "conv/reference"
    reasons = dict(explain("linear", QuantSpec.parse("int8"), spec("uint8"), (8, 65537), ALL))
    assert reasons["linear/avx2"] == "sums of 65537 products may overflow int32"


def test_adds_need_the_native_module_or_take_the_reference() -> None:
    assert chosen("add", "uint8/asym", "int8", ALL, ()) == "add/native"
    assert chosen("add", "uint8/asym", "int8", frozenset(), ()) == "add/reference"


def test_every_row_has_its_own_name_and_can_be_reached() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    assert all(kernel.name.split("/")[0] == kernel.op for kernel in KERNELS)
    assert {need for kernel in KERNELS for need in kernel.requires} <= ALL | GPU
    reached = {chosen(op, weight, input, f, (8, 16)) for op in {kernel.op for kernel in KERNELS}
               for weight in ("int8", "int8/group8", "fp16") for input in ("int8", None)
               for f in (*SUBSETS.values(), GPU)}  # fmt: skip
    assert reached == set(names)


def test_the_explanation_gives_one_reason_for_every_row() -> None:
    reasons = explain("linear", QuantSpec.parse("int8/channel"), spec("uint8/asym"), (8, 16), SUBSETS["avx2"])
    assert reasons == [
        ("linear/avx512_vnni", "needs avx512_vnni"),
        ("linear/groups/avx512_vnni", "needs avx512_vnni"),
        ("linear/avx2", "taken"),
        ("linear/groups/avx2", "needs several scales per output"),
        ("linear/neon_i8mm", "needs neon_i8mm"),
        ("linear/groups/neon_i8mm", "needs neon_i8mm"),
        ("linear/neon_dotprod", "needs neon_dotprod"),
        ("linear/groups/neon_dotprod", "needs neon_dotprod"),
        ("linear/portable", "comes after linear/avx2"),
        ("linear/groups/portable", "needs several scales per output"),
        ("linear/triton", "needs cuda, triton"),
        ("linear/reference", "comes after linear/avx2"),
        ("linear/decode/avx512_vnni", "needs avx512_vnni"),
        ("linear/decode/avx2", "comes after linear/avx2"),
        ("linear/decode/neon_i8mm", "needs neon_i8mm"),
        ("linear/decode/neon_dotprod", "needs neon_dotprod"),
        ("linear/decode/portable", "comes after linear/avx2"),
        ("linear/decode/triton", "needs cuda, triton"),
        ("linear/decode", "comes after linear/avx2"),
    ]
    reasons = dict(explain("conv", QuantSpec.parse("nf4/channel"), None, (8, 3, 3, 3), frozenset()))
    assert reasons["conv/portable"] == "needs native"
    assert reasons["conv/reference"] == "needs an integer input"
    assert reasons["conv/decode"] == "taken"
    reasons = dict(explain("linear", QuantSpec.parse("nf4/channel"), spec("int8"), (8, 16), ALL))
    assert reasons["linear/avx2"] == "needs whole numbers of at most 8 bits"
    reasons = dict(explain("linear", QuantSpec.parse("int8/group8"), spec("int8"), (8, 16), ALL))
    assert reasons["linear/avx2"] == "needs symmetric weights with one scale per tensor or output"
    assert reasons["linear/groups/avx512_vnni"] == "taken"
    reasons = dict(explain("linear", QuantSpec.parse("int8/group8/asym"), spec("int8"), (8, 16), ALL))
    assert reasons["linear/reference"] == "needs symmetric weights with scales per tensor, channel or group"
    reasons = dict(explain("conv", QuantSpec.parse("int8/group8"), spec("int8"), (8, 16, 3, 3), ALL))
    assert reasons["conv/avx2"] == "groups need a 2-d weight"


def test_the_choice_is_a_pure_function_of_its_arguments() -> None:
    first = [chosen("linear", "int8", "uint8", features) for features in SUBSETS.values()]
    assert [chosen("linear", "int8", "uint8", features) for features in SUBSETS.values()] == first


def test_an_operator_without_a_row_is_named() -> None:
    with pytest.raises(KernelError, match="no kernel for lstm with weight int8/channel and input float"):
        select("lstm", QuantSpec.parse("int8/channel"), None, (8, 16), ALL)


@pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if k.op == "linear" and k.requires <= cpu.cpu_features()], ids=lambda k: k.name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_rows_take_inputs_of_any_float_type_and_compute_in_float32(kernel, dtype) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    text = "int8/group4" if "groups" in kernel.name else "int8/channel"
    weight = quantize(torch.randn(5, 12, generator=generator), QuantSpec.parse(text))
    x = torch.randn(3, 12, generator=generator).half()  # exact in all three types
    input = Activation(QuantSpec.parse("uint8/asym"), QParams(torch.tensor([0.02]), torch.tensor([120.0])))
    expected = kernel.run(x.float(), kernel.pack(weight, 1), weight.spec, None, input)
    got = kernel.run(x.to(dtype), kernel.pack(weight, 1), weight.spec, None, input)
    assert got.dtype is torch.float32
    assert torch.equal(got, expected)
