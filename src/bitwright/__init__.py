"""bitwright: from a trained PyTorch model to a low-bit model that is, bit for bit, the one you trained.

The straight line: `Plan` -> `prepare` -> `calibrate` -> `train` -> `convert` -> `save` / `export`; or all of it in one
call: `quantize_model`, or `mix_model` with bits that differ by layer.
"""

from bitwright.algorithms.pipeline import calibrate
from bitwright.auto import Result, quantize_model
from bitwright.bench.measure import Measurement, measure
from bitwright.claims.certificate import Certificate
from bitwright.claims.certify import certify
from bitwright.claims.matrix import Matrix, matrix
from bitwright.claims.verify import Verification, verify
from bitwright.costs.latencies import LatencyTable, measure_machine
from bitwright.costs.roofline import get_machine
from bitwright.errors import BitwrightError
from bitwright.export.onnx import export
from bitwright.flow.checkpoint import load, load_weights, save
from bitwright.flow.convert import convert
from bitwright.flow.coverage import coverage
from bitwright.flow.evaluate import compare, evaluate, item_scores, paired_drop
from bitwright.flow.prepare import prepare
from bitwright.graph.calls import Add, Attention, Cat, MatMul
from bitwright.graph.dataflow import record
from bitwright.harm.sensitivity import sensitivity
from bitwright.joint import mix_model
from bitwright.nn.swap import register_module
from bitwright.numerics.qtensor import QTensor, dequantize, quantize
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site
from bitwright.search.budget import Budget
from bitwright.search.mixed import mixture, with_allocation
from bitwright.train.loop import train
from bitwright.train.schedule import Schedule, param_groups
from bitwright.train.training import Training

__version__ = "0.1.0"

__all__ = [
    "Add",
    "Attention",
    "BitwrightError",
    "Budget",
    "Cat",
    "Certificate",
    "LatencyTable",
    "MatMul",
    "Matrix",
    "Measurement",
    "Plan",
    "QTensor",
    "QuantSpec",
    "Result",
    "Schedule",
    "Site",
    "Training",
    "Verification",
    "calibrate",
    "certify",
    "compare",
    "convert",
    "coverage",
    "dequantize",
    "evaluate",
    "export",
    "get_machine",
    "item_scores",
    "load",
    "load_weights",
    "matrix",
    "measure",
    "measure_machine",
    "mix_model",
    "mixture",
    "paired_drop",
    "param_groups",
    "prepare",
    "quantize",
    "quantize_model",
    "record",
    "register_module",
    "save",
    "sensitivity",
    "train",
    "verify",
    "with_allocation",
]
