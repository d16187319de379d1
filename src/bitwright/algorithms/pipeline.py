"""`calibrate`: choose all ranges, and run the steps of the plan around that.

The straight line calls this one; `flow.calibrate` is its middle part. What each step did to each layer, or why it could
do nothing, is kept on the model: `outcomes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

from torch import Tensor, nn

from bitwright.algorithms import statistics
from bitwright.algorithms.awq import awq
from bitwright.algorithms.bias import analytic_bias_correction, bias_correction
from bitwright.algorithms.blocks import find_blocks
from bitwright.algorithms.equalize import absorb_high_bias, equalize
from bitwright.algorithms.gptq import gptq
from bitwright.algorithms.layers import Layer, NotApplicableError
from bitwright.algorithms.lockstep import Forward, Visit, run_counts, visits
from bitwright.algorithms.outcome import Outcome
from bitwright.algorithms.reconstruct import Block, adaquant, adaround, brecq
from bitwright.algorithms.rotate import rotate
from bitwright.algorithms.smoothquant import smoothquant
from bitwright.errors import CalibrationError
from bitwright.flow import calibrate as ranges
from bitwright.flow.prepare import plan_of
from bitwright.graph.dataflow import call
from bitwright.nn.layer import QLayer, Simulated
from bitwright.observe import ranks
from bitwright.plan.step import Step, Value

FLOAT: dict[str, Callable[[nn.Module, Sequence[Any], Forward, Mapping[str, Value]], list[Outcome]]] = {
    "cle": equalize,
    "absorb_high_bias": absorb_high_bias,
    "smoothquant": smoothquant,
    "awq": awq,
    "rotate": rotate,
}
"""Methods of the moment ``float``: they change the prepared model, which computes the same in float afterwards."""

LAYER: dict[str, Callable[[Layer, Mapping[str, Value]], str | None]] = {
    "bias_correction": bias_correction,
    "gptq": gptq,
    "adaround": adaround,
    "adaquant": adaquant,
    "bn_reestimation": statistics.bn_reestimation,
    "affine_repair": statistics.affine_repair,
    "ranges": statistics.ranges,
}
"""Methods of the moment ``layer``: they change the layer, or raise `NotApplicableError` with the reason.

They may return a note about what they left as it was."""

FORESEEN: dict[str, Callable[[nn.Module, Any, Forward], Callable[[Layer, Mapping[str, Value]], str | None]]] = {
    "analytic_bias_correction": analytic_bias_correction
}
"""Methods of the moment ``layer`` that look at the calibrated model and one batch first, then at layer after layer."""

BLOCK: dict[str, Callable[[Block, Mapping[str, Value]], None]] = {"brecq": brecq}
"""Methods of the moment ``block``: they change the layers of a block, or raise `NotApplicableError` with the reason."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] = (),
    *,
    forward: Callable[[nn.Module, Any], Any] = call,
    unseen: Literal["raise", "dynamic"] = "raise",
    on_layer: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Choose all scales of a prepared model and run the steps of its plan, in place.

    A batch is what the model takes (a tensor, a tuple of positional or a dict of keyword arguments); for other data
    pass ``forward``, e.g. ``lambda model, batch: model(batch[0])``. Plans without static activations and without steps
    need no batches. With steps, batches are kept: they are run several times. Runs in eval mode without gradients.
    Under ``torch.distributed`` each rank passes its own batches of the data; all ranks end with equal models.

    Returns the paths of quantized modules that no batch reached (and experts of a mixture that no token reached, which
    use the ranges of the others): with ``unseen="dynamic"`` their activations take their range from each live tensor
    from now on, in model and plan; with ``"raise"`` they are an error. ``on_layer(path, done, total)`` shows progress.

    Raises `CalibrationError` for no batches, values that are not finite, batches that do not fit, and modules that
    never ran; without steps the model then still computes in float, with steps prepare it anew.
    """
    steps = plan_of(model).steps
    if not steps:
        return ranges.calibrate(model, batches, forward=forward, unseen=unseen)
    with ranks.together():
        batches = list(batches)
        if not batches:
            raise CalibrationError(f"step {steps[0].name} of the plan needs data; pass calibration batches")
    found: list[Outcome] = []
    for step in (step for step in steps if step.method.moment == "float"):
        found += FLOAT[step.name](model, batches, forward, step.settings)
    missed = ranges.calibrate(model, batches, forward=forward, unseen=unseen)
    show = on_layer or (lambda *_: None)
    chosen = [step for step in steps if step.method.moment == "layer"]
    blockwise = [step for step in steps if step.method.moment == "block"]
    floats = _parameters(model) if chosen and blockwise else {}
    if chosen:
        found += _layer_steps(model, batches, forward, chosen, show)
    if blockwise:
        found += _block_steps(model, batches, forward, blockwise, floats, show)
    model.bitwright_outcomes = tuple(found)  # type: ignore[assignment]
    return missed


def outcomes(model: nn.Module) -> tuple[Outcome, ...]:
    """What the steps of a calibrated model did, layer by layer, in the order they ran."""
    return getattr(model, "bitwright_outcomes", ())


def _layer_steps(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    steps: Sequence[Step],
    on_layer: Callable[[str, int, int], None],
) -> list[Outcome]:
    refused = _refused(model, batches[0], forward)
    layers = [path for path, module in model.named_modules() if isinstance(module, QLayer) and path not in refused]
    found = [Outcome(step.name, path, skipped=reason) for path, reason in refused.items() for step in steps]
    foreseen = {s.name: FORESEEN[s.name](model, batches[0], forward) for s in steps if s.name in FORESEEN}
    methods = LAYER | foreseen
    with closing(visits(model, batches, forward, layers)) as walk:
        for visit in walk:
            on_layer(visit.path, visit.done, visit.total)
            assert isinstance(visit.module, QLayer)
            found += _taken(steps, methods, Layer(visit, visit.module), visit)
    return found


def _block_steps(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    steps: Sequence[Step],
    floats: Mapping[nn.Parameter, Tensor],
    on_layer: Callable[[str, int, int], None],
) -> list[Outcome]:
    refused = _refused(model, batches[0], forward)
    layers = [path for path, module in model.named_modules() if isinstance(module, QLayer) and path not in refused]
    found = [Outcome(step.name, path, skipped=reason) for path, reason in refused.items() for step in steps]
    blocks = ranks.first(find_blocks(model, batches[0], forward, layers))
    with closing(visits(model, batches, forward, blocks, floats)) as walk:
        for visit in walk:
            on_layer(visit.path, visit.done, visit.total)
            block = Block(visit, [model.get_submodule(path) for path in blocks[visit.path]], floats)  # type: ignore[misc]
            found += _taken(steps, BLOCK, block, visit)
    return found


def _taken(
    steps: Sequence[Step], methods: Mapping[str, Callable[..., str | None]], subject: Layer | Block, visit: Visit
) -> list[Outcome]:
    """The outcomes of all steps at one layer or block."""
    absent = [rank for rank, count in enumerate(ranks.gathered(len(visit.calls))) if not count]
    if absent:  # the float model and the quantized one went different ways, or one rank's batches and another's
        batch = f"batch of rank {absent[0]}" if ranks.world_size() > 1 else "batch"
        reason = f"no {batch} reached it both in float and in simulation"
        return [Outcome(step.name, visit.path, skipped=reason) for step in steps]
    found, before = [], subject.error()
    for step in steps:
        try:
            note = methods[step.name](subject, step.settings)
        except NotApplicableError as cause:
            found.append(Outcome(step.name, visit.path, skipped=str(cause)))
        else:
            after = subject.error()
            found.append(Outcome(step.name, visit.path, before, after, note=note or ""))
            before = after
    return found


def _parameters(model: nn.Module) -> dict[Any, Tensor]:
    """Copies of the parameters and running statistics that methods of a layer change: those of the float model."""
    layers = [module for module in model.modules() if isinstance(module, QLayer)]
    buffers = [buffer for layer in layers for norm in layer.norm for buffer in norm.buffers()]
    parameters = [parameter for layer in layers for parameter in layer.own_parameters()]
    return {tensor: tensor.detach().clone() for tensor in (*parameters, *buffers)}


def _refused(model: nn.Module, batch: Any, forward: Forward) -> dict[str, str]:
    """Quantized modules that no method of a layer can work on, with the reason; by the batch of rank 0."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Simulated)}
    counts = run_counts(model, batch, forward, layers)
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    refused = {}
    for path, module in layers.items():
        if not module.quantized_weights():
            continue
        if not isinstance(module, QLayer):
            refused[path] = "its products lie inside the module"
        elif counts[path] > 1:
            refused[path] = f"it runs {counts[path]} times in one forward"
        elif any(holders[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
            refused[path] = "it shares its weight with another module"
    return ranks.first(refused)
