"""What test_torch_ops.py runs in a process of its own, whose operators come from C++.

python cpp_operators.py LIBRARY TASK...
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ISAS = (0, 1, 2, 3)


def available(isa: int) -> bool:
    from bitwright.kernels import cpu

    return any(number == isa and (name == "portable" or name in cpu.cpu_features()) for name, number in cpu.ISA.items())


def activations(rows: int, k: int) -> Iterator[tuple[Tensor | None, Tensor | None, int, int]]:
    """Scale, zero point and range: dynamic, one of each, one per row."""
    yield None, None, -127, 127
    yield torch.tensor(0.05), None, -128, 127
    yield torch.tensor([0.03]), torch.tensor([93.0]), 0, 255
    yield torch.rand(rows) + 0.01, torch.randint(0, 16, (rows,)).float(), 0, 15


def linear_calls(isa: int) -> Iterator[tuple[Any, ...]]:
    from bitwright.kernels import cpu

    bits, n, k = random.choice((8, 4, 3, 2)), random.randint(1, 70), random.randint(1, 200)
    top = 1 << (bits - 1)
    codes = torch.randint(-top, top, (n, k), dtype=torch.int8)
    x = torch.randn(random.choice(((k,), (3, k), (2, 3, k), (0, k), (90, k))))
    bias = random.choice((None, torch.randn(n)))
    for scale, zero, qmin, qmax in activations(x.numel() // k, k):
        constants = (cpu.pack_linear(codes, bits), torch.rand(n) + 0.1, codes.sum(1, dtype=torch.int32))
        yield x, *constants, bias, scale, zero, bits, qmin, qmax, isa


def grouped_calls(isa: int) -> Iterator[tuple[Any, ...]]:
    from bitwright.kernels import grouped
    from bitwright.numerics.qtensor import quantize
    from bitwright.numerics.spec import QuantSpec

    size, n = random.choice((32, 64)), random.randint(1, 70)
    spec = QuantSpec.parse(f"{random.choice(('int8', 'int4', 'int3', 'int2', 'ternary'))}/group{size}")
    k = size * random.randint(2, 5)
    layout, scales, sums = grouped.pack(quantize(torch.randn(n, k), spec))
    x, bias = torch.randn(random.choice(((k,), (3, k), (2, 3, k), (0, k)))), random.choice((None, torch.randn(n)))
    for scale, zero, qmin, qmax in activations(x.numel() // k, k):
        yield x, layout, scales, sums, bias, scale, zero, n, size, grouped.layout_bits(spec), qmin, qmax, isa


def decoded_calls(isa: int) -> Iterator[tuple[Any, ...]]:
    from bitwright.kernels import decoded
    from bitwright.numerics.qtensor import quantize
    from bitwright.numerics.spec import QuantSpec

    for text in ("int8/channel", "int4/asym/group32", "nf4/group64", "int3/channel", "ternary/group32"):
        spec, n, k = QuantSpec.parse(text), random.randint(1, 70), 64 * random.randint(1, 5)
        weight = decoded.pack(quantize(torch.randn(n, k), spec))
        x = torch.randn(random.choice(((k,), (3, k), (2, 3, k), (0, k), (100, k))))
        bias = random.choice((None, torch.randn(n)))
        yield x, *weight, bias, n, spec.granularity.size, decoded.layout_bits(spec), isa
    wide = quantize(torch.randn(3000, 1280), QuantSpec.parse("int4/group32"))  # more than one panel
    yield torch.randn(65, 1280), *decoded.pack(wide), torch.randn(3000), 3000, 32, 4, isa


def conv_calls(isa: int) -> Iterator[tuple[Any, ...]]:
    from bitwright.kernels import cpu

    bits, groups, depth = random.choice((8, 4, 3, 2)), random.choice((1, 1, 2, 8)), random.randint(1, 5)
    c, o, top = groups * depth, groups * random.randint(1, 20), 1 << (bits - 1)
    kernel, stride = [random.randint(1, 3) for _ in "yx"], [random.randint(1, 2) for _ in "yx"]
    padding, dilation = [random.randint(0, 2) for _ in "yx"], [random.randint(1, 2) for _ in "yx"]
    codes = torch.randint(-top, top, (o, depth, *kernel), dtype=torch.int8)
    constants = (cpu.pack_conv(codes, bits, groups), torch.rand(o) + 0.1, codes.flatten(1).sum(1, dtype=torch.int32))
    x = torch.randn(2, c, random.randint(5, 12), random.randint(5, 12))
    for image in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x[:0]):
        yield (
            image, *constants, random.choice((None, torch.randn(o))), torch.tensor(0.05),
            random.choice((None, torch.tensor([3.0]))), kernel, stride, padding, dilation, groups, bits, 0, 255, isa,
        )  # fmt: skip


def add_calls(isa: int) -> Iterator[tuple[Any, ...]]:
    a, b = torch.randn(2, 2, 5, 7, 3).unbind()
    last, one = a.contiguous(memory_format=torch.channels_last), torch.tensor([0.05])
    for left, right in ((a, b), (last, b), (b, last), (a.transpose(2, 3), b.transpose(2, 3)), (a[0, 0, 0, 0], one[0])):
        yield left, right, one, None, one * 2, torch.tensor([7.0]), [-128, 127], [0, 255]


def operators() -> dict[str, tuple[Callable[..., Tensor], Callable[[int], Iterator[tuple[Any, ...]]]]]:
    """The Python function and the calls of every operator."""
    from bitwright.kernels import cpu, decoded, grouped

    return {
        "linear": (cpu._linear, linear_calls),
        "grouped_linear": (grouped._grouped_linear, grouped_calls),
        "decoded_linear": (decoded._decoded_linear, decoded_calls),
        "conv2d": (cpu._conv2d, conv_calls),
        "add": (cpu._add, add_calls),
    }


def equal() -> None:
    """Every operator equals the Python function, results' memory included, for random shapes, with 1 and 2 threads."""
    from bitwright.kernels.operators import IN_CPP, implementation

    assert implementation() == "C++"
    assert set(operators()) == set(IN_CPP)
    for name, (python, calls) in operators().items():
        count = 0
        for isa in filter(available, ISAS):
            for round in range(6):
                torch.set_num_threads(1 + round % 2)
                for arguments in calls(isa):
                    found, expected = getattr(torch.ops.bitwright, name)(*arguments), python(*arguments)
                    assert torch.equal(found, expected), (name, isa, arguments)
                    assert found.stride() == expected.stride(), (name, isa, arguments)
                    count += 1
        print(f"{name}: {count} calls equal")


def registered() -> None:
    """``opcheck``: schemas tell the truth, shapes agree, nothing breaks under the compiler."""
    for name, (_, calls) in operators().items():
        for arguments in list(calls(0))[:2]:
            torch.library.opcheck(getattr(torch.ops.bitwright, name).default, arguments)


class Net(nn.Module):
    """Convolutions, a sum, integer products with one scale and with groups, and a product with float activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.linear, self.grouped, self.decoded = nn.Linear(512, 64), nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = (self.second(x) + x).relu().flatten(1)
        return self.decoded(self.grouped(self.linear(x).relu()).relu())


def converted() -> tuple[nn.Module, Tensor]:
    import bitwright as bw

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(4, 3, 8, 8)
    sites = {"grouped.weight": "int4/group32", "decoded.weight": "int4/group32", "decoded.input": "float"}
    prepared = bw.prepare(net, bw.Plan.preset("w8a8", net, x, sites=sites))
    bw.calibrate(prepared, [x])
    return bw.convert(prepared.eval()), x


def called(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if "bitwright" in str(node.target)}


def refused() -> None:
    """Layers raise the errors that they raise with operators in Python; direct calls raise what torch makes of them."""
    import pytest

    from bitwright.errors import KernelError, NumericsError
    from bitwright.kernels import table
    from bitwright.kernels.row import Activation
    from bitwright.numerics.qtensor import quantize
    from bitwright.numerics.spec import QuantSpec

    row = next(kernel for kernel in table.KERNELS if kernel.name == "linear/portable")
    weight, x = quantize(torch.randn(5, 64), QuantSpec.parse("int8/channel")), torch.randn(3, 64)
    packed, dynamic = row.pack(weight, 1), Activation(QuantSpec.parse("int8/token/dynamic"), None)
    with pytest.raises(KernelError, match="linear: packed weights have 1024 bytes, these shapes need 768"):
        row.run(x[:, :48], packed, weight.spec, None, dynamic)
    with pytest.raises(NumericsError, match="linear: row 0 of x has no dynamic scale: it holds NaN"):
        row.run(x * torch.nan, packed, weight.spec, None, dynamic)
    arguments = (packed.layout, packed.scale, packed.sums, None)
    for rest, error, message in (
        ((None, None, 8, -127, 127, 99), ValueError, "linear: instruction set 99 is not available"),
        ((None, None, 8, -127, 127, 2**40), ValueError, "linear: 1099511627776 is out of range"),
        ((torch.ones(4), None, 8, -127, 127, 0), ValueError, "scale has 4 values, expected 1 or 3"),
        ((torch.ones(1).double(), None, 8, -127, 127, 0), ValueError, "scale must be float32, got Double"),
    ):
        with pytest.raises(error, match=message):
            torch.ops.bitwright.linear(x, *arguments, *rest)
    x[1, 7] = torch.inf
    with pytest.raises(OverflowError, match="row 1 of x has no dynamic scale"):
        torch.ops.bitwright.linear(x, *arguments, None, None, 8, -127, 127, 0)


def compiled() -> None:
    """A converted net is one graph, with the operators of C++, and computes the same."""
    from bitwright.kernels.operators import IN_CPP

    net, x = converted()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        assert torch.equal(torch.compile(net, fullgraph=True, backend=keep)(x), net(x))
    # Of the hook that makes deferred results ordinary ones torch compiles a graph too; nothing is computed in it.
    found = [operators for graph in graphs if (operators := called(graph.graph))]
    assert found == [{f"bitwright.{name}.default" for name in IN_CPP}]


def packaged() -> None:
    """AOTInductor compiles a converted net for any batch; writes net.pt2, an input and what the net makes of it."""
    import torch._inductor

    net, x = converted()
    quick = {  # to compile, not to run
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.precompile_headers": False,
        "cpp_cache_precompile_headers": False,
    }
    with torch.no_grad():
        exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        path = torch._inductor.aoti_compile_and_package(exported, package_path="net.pt2", inductor_configs=quick)
        package = torch._inductor.aoti_load_package(path)
        for batch in (x, x[:2], torch.randn(7, 3, 8, 8)):
            assert torch.equal(package(batch), net(batch))
        Path("x").write_bytes(x.numpy().tobytes())
        Path("y").write_bytes(net(x).numpy().tobytes())


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    for task in sys.argv[2:]:
        globals()[task]()
