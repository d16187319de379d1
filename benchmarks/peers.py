"""Products of other runtimes for kernels.py: torch, llama.cpp, ONNX Runtime, OpenVINO; each from weights in memory.

A peer that is not installed is named by `missing` and left out. Formats are not equal: llama.cpp's K-quants have two
levels of scales and minima, its blocks of 32 have float16 scales, ONNX Runtime's and torch's int8 have their own
scales of activations; the column of errors says what that does to random weights.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t
from ctypes import c_void_p as pointer
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = (32, 128)
PACKAGES = {"torch": "torch", "llama_cpp": "llama-cpp-python", "onnxruntime": "onnxruntime", "openvino": "openvino"}
SILENCE = ctypes.CFUNCTYPE(None, c_int, c_char_p, pointer)(lambda level, text, data: None)
GGML_TYPES = {"Q8_0": 8, "Q4_0": 2, "Q4_K": 12, "Q3_K": 11, "Q2_K": 10, "TQ2_0": 35, "TQ1_0": 34}
Call = Callable[[Tensor], Tensor]


@dataclass
class Contender:
    """A product with copies of its weights; ``calls`` takes them in turn, each call ``products`` of them."""

    name: str
    bytes: int
    calls: Iterator[Call]
    products: int = 1
    seconds: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)  # of a sum over as many bytes

    def time(self, x: Tensor, least: float) -> float:
        """Seconds per product, of as many calls as take ``least`` seconds."""
        return timed(lambda: next(self.calls)(x), least) / self.products


def timed(call: Callable[[], object], least: float) -> float:
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < least or not count:
        call()
        count += 1
    return spent / count


def missing() -> list[str]:
    """What to install for the peers that are not here."""
    return [package for name, package in PACKAGES.items() if importlib.util.find_spec(name) is None]


def versions() -> dict[str, str]:
    """Version of every peer; llama.cpp's libraries have one of their own."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES.values() if name not in missing()}
    if "llama-cpp-python" in found:
        found["ggml"] = Ggml(1).version
    return found


def contender(name: str, parts: tuple[Tensor | None, ...], call: Callable[..., Tensor], cold: int) -> Contender:
    """``call(x, *parts)`` with copies of ``parts`` that fill ``cold`` bytes."""
    size = sum(part.nbytes for part in parts if part is not None)
    copies = [[None if part is None else part.clone() for part in parts] for _ in range(1 + cold // size)]
    bound = [lambda x, own=own: call(x, *own) for own in copies]
    return Contender(name, size, itertools.cycle(bound))


def peers(weight: Tensor, widest: Tensor, rows: tuple[int, ...], cold: int, threads: int) -> Iterator[Contender]:
    """Every peer that is installed, on inputs ``widest[:m]`` for ``m`` of ``rows``; torch's float32 first."""
    yield from torch_products(weight, cold)
    if "llama-cpp-python" not in missing():
        ggml = Ggml(threads)
        for name in GGML_TYPES:
            yield ggml.contender(name, weight, widest, rows, cold)
    if "onnxruntime" not in missing():
        for bits, group in itertools.product((8, 4, 2), GROUPS):
            if weight.shape[1] % group == 0:
                yield onnxruntime_product(weight, bits, group, cold, threads)
    if "openvino" not in missing():
        yield openvino_product(weight, 8, weight.shape[1], cold, threads)
        for group in (size for size in GROUPS if weight.shape[1] % size == 0):
            yield openvino_product(weight, 4, group, cold, threads)


def symmetric(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes ``[n, groups, group]`` of int8 and scales ``[n, groups, 1]``, from the largest magnitude."""
    blocks = weight.unflatten(1, (-1, group))
    scale = blocks.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
    return (blocks / scale).round().to(torch.int8), scale


def nibbles(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes of 8, 4 or 2 bits side by side in bytes, the first in the lowest bits."""
    parts = codes.unflatten(-1, (-1, 8 // bits)).to(torch.int32)
    return (parts << torch.arange(0, 8, bits)).sum(-1).to(torch.uint8)


def torch_products(weight: Tensor, cold: int) -> Iterator[Contender]:
    """Torch's own: float32, dynamic int8, and its two weight-only kernels."""
    yield contender("torch float32", (weight,), F.linear, cold)
    size = weight.numel()
    layers = []
    for _ in range(1 + cold // size):
        layer = nn.Linear(*reversed(weight.shape), bias=False)
        layer.weight = nn.Parameter(weight.clone())
        layers.append(torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), dtype=torch.qint8))
    yield Contender("torch dynamic int8", size, itertools.cycle(layers))
    codes, scale = symmetric(weight, 8, weight.shape[1])
    parts = (codes.flatten(1), scale.flatten())
    yield contender("torch int8 weight-only", parts, torch.ops.aten._weight_int8pack_mm, cold)
    for group in (size for size in GROUPS if weight.shape[1] % size == 0):
        codes, step = symmetric(weight, 4, group)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).to(torch.int32).flatten(1), 1)
        scales = torch.cat([step, torch.zeros_like(step)], -1).transpose(0, 1).bfloat16().contiguous()

        def call(x: Tensor, packed: Tensor, scales: Tensor, group: int = group) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, scales)

        yield contender(f"torch int4/group{group} weight-only, bfloat16", (packed, scales), call, cold)


class InitParams(ctypes.Structure):
    """``ggml_init_params``."""

    _fields_ = (("size", c_size_t), ("memory", pointer), ("no_alloc", c_bool))


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_version": (c_char_p, []),
    "ggml_init": (pointer, [InitParams]),
    "ggml_free": (None, [pointer]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, pointer, pointer, c_int64, c_int64, c_int64, pointer]),
    "ggml_new_tensor_2d": (pointer, [pointer, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
    "ggml_new_graph_custom": (pointer, [pointer, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [pointer, pointer]),
    "ggml_backend_cpu_init": (pointer, []),
    "ggml_backend_cpu_set_n_threads": (None, [pointer, c_int]),
    "ggml_backend_cpu_buffer_type": (pointer, []),
    "ggml_backend_cpu_buffer_from_ptr": (pointer, [pointer, c_size_t]),
    "ggml_backend_get_device": (pointer, [pointer]),
    "ggml_backend_dev_backend_reg": (pointer, [pointer]),
    "ggml_backend_dev_supports_op": (c_bool, [pointer, pointer]),
    "ggml_backend_reg_get_proc_address": (pointer, [pointer, c_char_p]),
    "ggml_backend_buft_alloc_buffer": (pointer, [pointer, c_size_t]),
    "ggml_backend_buft_name": (c_char_p, [pointer]),
    "ggml_backend_buffer_free": (None, [pointer]),
    "ggml_backend_buffer_get_base": (pointer, [pointer]),
    "ggml_backend_tensor_alloc": (c_int, [pointer, pointer, pointer]),
    "ggml_backend_tensor_set": (None, [pointer, pointer, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [pointer, pointer]),
}


class Ggml:
    """llama.cpp's tensor library, as the package llama-cpp-python built it: single products on its CPU backend."""

    def __init__(self, threads: int) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        assert spec is not None
        assert spec.origin is not None
        self.lib = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml.so"))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self.lib.ggml_log_set(SILENCE, None)
        self.version = self.lib.ggml_version().decode()
        self.backend = self.lib.ggml_backend_cpu_init()
        self.lib.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.device = self.lib.ggml_backend_get_device(self.backend)

    def contender(self, name: str, weight: Tensor, widest: Tensor, rows: tuple[int, ...], cold: int) -> Contender:
        """A type of llama.cpp's, rounded by its own function without an importance matrix."""
        kind, (n, k) = GGML_TYPES[name], weight.shape
        packed = torch.empty(n * self.lib.ggml_row_size(kind, k), dtype=torch.uint8)
        self.lib.ggml_quantize_chunk(kind, weight.data_ptr(), packed.data_ptr(), 0, n, k, None)
        outputs = {m: torch.empty(m, n) for m in rows}
        copies = [GgmlProduct(self, kind, packed, widest, outputs) for _ in range(1 + cold // packed.nbytes)]
        where = copies[0].where
        return Contender(f"llama.cpp {name}, {where}", packed.nbytes, itertools.cycle(copies))

    def places(self) -> Iterator[int]:
        """Types of buffers for weights as llama.cpp tries them: those that lay weights out anew first."""
        registry = self.lib.ggml_backend_dev_backend_reg(self.device)
        address = self.lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)(self.device)
        yield from itertools.takewhile(bool, (extra[i] for i in itertools.count()))
        yield self.lib.ggml_backend_cpu_buffer_type()


class GgmlProduct:
    """One copy of a weight in the first place that serves its type, with a graph of one product per number of rows."""

    def __init__(self, ggml: Ggml, kind: int, packed: Tensor, widest: Tensor, outputs: dict[int, Tensor]) -> None:
        lib, self.ggml = ggml.lib, ggml
        self.inputs, self.outputs, self.graphs = widest, outputs, dict[int, int]()
        k, n = widest.shape[1], next(iter(outputs.values())).shape[1]
        self.context = lib.ggml_init(InitParams(1 << 18, None, True))
        weakref.finalize(self, lib.ggml_free, self.context)
        for place in ggml.places():
            weight = lib.ggml_new_tensor_2d(self.context, kind, k, n)
            buffer = lib.ggml_backend_buft_alloc_buffer(place, packed.nbytes + 64)
            weakref.finalize(self, lib.ggml_backend_buffer_free, buffer)
            lib.ggml_backend_tensor_alloc(buffer, weight, lib.ggml_backend_buffer_get_base(buffer))
            trial = lib.ggml_mul_mat(self.context, weight, self._tensor(widest[:1]))
            if lib.ggml_backend_dev_supports_op(ggml.device, trial):
                break
        self.where = lib.ggml_backend_buft_name(place).decode().removeprefix("CPU_").lower()
        lib.ggml_backend_tensor_set(weight, packed.data_ptr(), 0, packed.nbytes)
        for m, output in outputs.items():
            product = lib.ggml_mul_mat(self.context, weight, self._tensor(widest[:m]))
            self._lay(product, output)
            self.graphs[m] = lib.ggml_new_graph_custom(self.context, 8, False)
            lib.ggml_build_forward_expand(self.graphs[m], product)

    def _tensor(self, x: Tensor) -> int:
        tensor = self.ggml.lib.ggml_new_tensor_2d(self.context, 0, x.shape[1], x.shape[0])
        self._lay(tensor, x)
        return tensor

    def _lay(self, tensor: int, memory: Tensor) -> None:
        """Make a tensor of the graph the memory of one of torch's."""
        buffer = self.ggml.lib.ggml_backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.nbytes)
        weakref.finalize(self, self.ggml.lib.ggml_backend_buffer_free, buffer)
        self.ggml.lib.ggml_backend_tensor_alloc(buffer, tensor, memory.data_ptr())

    def __call__(self, x: Tensor) -> Tensor:
        assert x.data_ptr() == self.inputs.data_ptr(), "this graph reads the inputs that it was built on"
        self.ggml.lib.ggml_backend_graph_compute(self.ggml.backend, self.graphs[len(x)])
        return self.outputs[len(x)]


def onnxruntime_product(weight: Tensor, bits: int, group: int, cold: int, threads: int) -> Contender:
    """MatMulNBits, activations in 8 bits (accuracy level 4): a product per copy in one graph, all run per call."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    (n, k), nodes, constants = weight.shape, [], []
    size = weight.numel() * bits // 8 + 4 * weight.numel() // group
    for i in range(copies := 1 + cold // size):
        codes, scale = symmetric(weight.roll(i, 0), bits, group)  # equal constants would be stored once
        packed = nibbles(codes.to(torch.int32) + 2 ** (bits - 1), bits)
        constants += [numpy_helper.from_array(packed.numpy(), f"w{i}")]
        constants += [numpy_helper.from_array(scale.flatten().numpy(), f"s{i}")]
        settings = {"K": k, "N": n, "bits": bits, "block_size": group, "accuracy_level": 4}
        names = ["x", f"w{i}", f"s{i}"]
        nodes += [helper.make_node("MatMulNBits", names, [f"y{i}"], domain="com.microsoft", **settings)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["m", n]) for i in range(copies)]
    graph = helper.make_graph(nodes, "products", [x], outputs, constants)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it slows who comes next
    model = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def call(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return Contender(f"ONNX Runtime int{bits}/group{group}", size, itertools.cycle([call]), copies)


def openvino_product(weight: Tensor, bits: int, group: int, cold: int, threads: int) -> Contender:
    """Compressed weights, activations in 8 bits in groups of 32: a product per copy, all run per call."""
    import openvino
    from openvino import opset15 as op

    (n, k), x = weight.shape, op.parameter([-1, weight.shape[1]], openvino.Type.f32)
    size = weight.numel() * bits // 8 + 2 * weight.numel() // group
    products = []
    for i in range(1 + cold // size):
        codes, scale = symmetric(weight.roll(i, 0), bits, group)
        packed = nibbles(codes & (2**bits - 1), bits).numpy()
        codes = openvino.Tensor(packed, list(codes.shape), getattr(openvino.Type, f"i{bits}"))
        constants = op.constant(codes, shared_memory=False), op.constant(scale.half().numpy(), shared_memory=False)
        wide = op.multiply(op.convert(constants[0], "f16"), constants[1])
        wide = op.convert(op.reshape(wide, [n, k], special_zero=False), "f32")
        products.append(op.matmul(x, wide, transpose_a=False, transpose_b=True))
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 32
    model = openvino.Model(products, [x], "products")
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def call(x: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0])

    name = "channel" if group == k else f"group{group}"
    return Contender(f"OpenVINO int{bits}/{name}", size, itertools.cycle([call]), len(products))
