"""README claim: whole models in 8 bits against other runtimes on the same codes, in alternating runs.

ResNet-18, ResNet-50 and MobileNetV2 (224x224) and a BERT-base-shaped encoder (128 tokens), random weights: this times
shapes, not accuracy. ONNX Runtime and OpenVINO load the very file that `export` writes, and the float model's; OpenVINO
computes float in float32 where "float32" stands. Errors are those of the outputs, relative to the float model's.
Writes results/networks.json after every model.

    pip install openvino
    python benchmarks/networks.py [--rounds 20] [--batches 1 8] [--only ResNet-18]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bitwright as bw
from models import Encoder, MobileNetV2, ResNet, settle_batchnorm
from results import FOLDER, write

SHAPES = {"ResNet-18": (3, 224, 224), "ResNet-50": (3, 224, 224), "MobileNetV2": (3, 224, 224), "BERT-base": (128, 768)}


class Foreign(nn.Module):
    """A runtime's session as a module, so that all are timed by one function."""

    def __init__(self, run: Callable[[Any], Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.run(x.numpy()))


def onnxruntime_session(path: Path, threads: int) -> Foreign:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Foreign(lambda x: session.run(None, {name: x})[0])


def openvino_session(path: Path, threads: int, shape: tuple[int, ...]) -> Foreign:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(shape))
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return Foreign(lambda x: request.infer([x], share_inputs=True, share_outputs=True)[0])


def float_model(name: str) -> nn.Module:
    if name == "BERT-base":
        return Encoder().eval()
    model = MobileNetV2() if name == "MobileNetV2" else ResNet(int(name.removeprefix("ResNet-")))
    return settle_batchnorm(model, 4, *SHAPES[name])


def shipped(model: nn.Module, example: Tensor, target: str) -> nn.Module:
    plan = bw.Plan.preset("w8a8", model, example, target=target)
    prepared = bw.prepare(model, plan)
    bw.calibrate(prepared, [example])
    return bw.convert(prepared, inplace=True)


def contenders(model: nn.Module, x: Tensor, example: Tensor, folder: Path, threads: int) -> dict[str, nn.Module]:
    """The float model first; then ours, and other runtimes in float32 and on our codes."""
    found: dict[str, nn.Module] = {"torch float32": model}
    found["torch float32 compiled"] = torch.compile(model)  # type: ignore[assignment]
    found["bitwright int8"] = shipped(model, example, "cpu")
    torch.onnx.export(model, (x,), folder / "float.onnx", dynamo=True, verbose=False)
    bw.export(shipped(model, example, "onnxruntime"), folder / "int8.onnx", x)
    for kind, file in (("float32", "float.onnx"), ("int8", "int8.onnx")):
        found[f"ONNX Runtime {kind}"] = onnxruntime_session(folder / file, threads)
        found[f"OpenVINO {kind}"] = openvino_session(folder / file, threads, tuple(x.shape))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--only", nargs="+", default=list(SHAPES))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    path = FOLDER / "networks.json"
    for name in options.only:
        model, example = float_model(name), torch.randn(8, *SHAPES[name])
        for batch in options.batches:
            x = example[:batch].clone()
            with tempfile.TemporaryDirectory() as folder:
                models = contenders(model, x, example, Path(folder), options.threads)
                with torch.inference_mode():
                    exact = model(x)
                    errors = {each: ((run(x) - exact).norm() / exact.norm()).item() for each, run in models.items()}
                rows = bw.measure(models, x, rounds=options.rounds)
            found: dict[str, dict[str, float]] = {}
            for row in rows:
                error = errors[row.name]
                print(
                    f"{name} batch {batch} {row.name:22s} {1e3 * row.seconds:8.2f} ms  {row.speed}  error {error:.1e}",
                    flush=True,
                )
                speed = {"speed": row.speed.median, "speed 10 %": row.speed.low, "speed 90 %": row.speed.high}
                found[row.name] = {"ms": 1e3 * row.seconds, "error": error} | speed
            results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
            results[f"{name}, batch {batch}"] = found
            write("networks", results)


if __name__ == "__main__":
    main()
