"""Random draws whose mean is the trace of a block of the Hessian, with little noise.

``v_k' (H v)_k`` with random signs v (Hutchinson) is unbiased but noisy: the signs of all other blocks are in it. For
the Fisher matrix F of the model's answers, the Gauss-Newton part of H for losses like cross entropy, the trace can be
had without them. At the outputs z of one item the Hessian of such a loss is
``S = diag(p) - p p' = A A'`` with ``A = diag(sqrt p) - p sqrt(p)'``, so for random signs r ``|dz/dw_k' A r|^2`` has the
mean ``tr F_k``, each item and block by itself. So where outputs are known a draw is that, plus Hutchinson's for
``H - F``. The sum is unbiased for any loss, and quiet where the loss resembles the model's own answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import SearchError
from bitwright.harm.alone import Forward
from bitwright.harm.fisher import items_of, samples_of
from bitwright.harm.hessian_products import Loss, Run, gradients, own_answers, products, rows_of

FEWEST, MOST, PRECISION, SMALL = 6, 200, 0.05, 0.01


def estimates(
    run: Run,
    batches: Sequence[Any],
    loss: Loss | None,
    forward: Forward | None,
    *,
    scales: Mapping[Any, Tensor] | None = None,
    precision: float = PRECISION,
    fewest: int = FEWEST,
    most: int = MOST,
    seed: int = 0,
) -> dict[Any, Tensor]:
    """Draws of the trace of each variable of ``run``, for each batch: float64 ``[batches, draws]``.

    One of ``loss`` and ``forward`` is given, or both. Signs are multiplied by ``scales`` of a variable, which gives the
    trace with respect to ``variable / scale``. For when it stops see `bitwright.harm.hessian.traces`.
    """
    if fewest < 2 or most < fewest:
        raise SearchError(f"a standard error needs at least 2 draws, got fewest={fewest}, most={most}")
    draws = _Draws(run, torch.Generator().manual_seed(seed), scales or {})
    shares, found = shares_of(batches), draws.round(batches, loss, forward, fewest)
    for done in range(fewest, most, fewest):
        if not found or _precise(torch.stack([shares @ values for values in found.values()]), precision):
            break
        more = draws.round(batches, loss, forward, min(fewest, most - done))
        found = {key: torch.cat([values, more[key]], 1) for key, values in found.items()}
    return found


def shares_of(batches: Sequence[Any]) -> Tensor:
    """Weight of each batch in the mean over all items, float64 ``[batches]``."""
    if not batches:
        raise SearchError("curvature needs data, got no batches")
    counts = torch.tensor([items_of(batch) for batch in batches], dtype=torch.float64)
    return counts / counts.sum()


def check_finite(key: Any, values: Tensor) -> None:
    """Raise `SearchError` for curvature that is not finite."""
    if not values.isfinite().all():
        raise SearchError(f"the curvature of the loss at {key} is not finite; look at the loss and at the data")


class _Draws:
    def __init__(self, run: Run, generator: torch.Generator, scales: Mapping[Any, Tensor]) -> None:
        self.run, self.generator, self.scales = run, generator, scales

    def round(
        self, batches: Sequence[Any], loss: Loss | None, forward: Forward | None, draws: int
    ) -> dict[Any, Tensor]:
        """``draws`` draws for each batch."""
        found: dict[Any, Tensor] = {}

        def add(index: int, draw: int, parts: dict[Any, float]) -> None:
            for key, value in parts.items():
                into = found.setdefault(key, torch.zeros(len(batches), draws, dtype=torch.float64))
                into[index, draw] += value

        for index, batch in enumerate(batches):
            if forward is not None:
                for draw, parts in self._answers(batch, forward, draws):
                    add(index, draw, parts)
            if loss is not None:
                for draw, parts in self._signs(batch, _rest(loss, forward), draws):
                    add(index, draw, parts)
        for key, values in found.items():
            check_finite(key, values)
        return found

    def _answers(self, batch: Any, forward: Forward, draws: int) -> Iterator[tuple[int, dict[Any, float]]]:
        """``|dz/dw' A r|^2`` of single items: the mean over the items of a batch is the sum of what this yields."""
        items = samples_of(batch)
        for item in items:
            logits: list[Tensor] = []

            def see(model: nn.Module, x: Any, logits: list[Tensor] = logits) -> Tensor:
                logits += rows_of(forward(model, x))
                return torch.zeros(())

            _, variables = self.run(see, item)
            for draw in range(draws):
                total = torch.stack([(self._direction(rows) * rows).sum() for rows in logits]).sum()
                found = torch.autograd.grad(total, list(variables.values()), retain_graph=True, allow_unused=True)
                pairs = [(key, g) for key, g in zip(variables, found, strict=True) if g is not None]
                yield (
                    draw,
                    {key: (g * self._scale(key)).double().square().sum().item() / len(items) for key, g in pairs},
                )

    def _direction(self, rows: Tensor) -> Tensor:
        """``A r`` of each row, such that squares add up to the mean over rows."""
        p = rows.detach().softmax(-1)
        drawn = p.sqrt() * self._sign(p)
        return (drawn - p * drawn.sum(-1, keepdim=True)) / math.sqrt(len(rows))

    def _signs(self, batch: Any, loss: Loss, draws: int) -> Iterator[tuple[int, dict[Any, float]]]:
        """``v_k' (H v)_k`` of one batch."""
        variables, gradient = gradients(self.run, loss, batch)
        for draw in range(draws):
            probes = {key: self._sign(x) * self._scale(key) for key, x in variables.items()}
            found = products(variables, gradient, probes)
            yield draw, {key: (probes[key] * product).sum().item() for key, product in found.items()}

    def _scale(self, key: Any) -> Tensor | float:
        return self.scales.get(key, 1.0)

    def _sign(self, x: Tensor) -> Tensor:
        drawn = torch.randint(0, 2, x.shape, generator=self.generator, dtype=torch.int8)
        return (2 * drawn - 1).to(x)


def _rest(loss: Loss, forward: Forward | None) -> Loss:
    """The loss less `own_answers`, whose value and gradient are 0: its Hessian is ``H - F``."""
    if forward is None:
        return loss
    answers = own_answers(forward)
    return lambda model, batch: loss(model, batch) - answers(model, batch)


def _precise(totals: Tensor, precision: float) -> bool:
    means, errors = totals.mean(1).abs(), totals.std(1) / math.sqrt(totals.shape[1])
    return bool((errors <= precision * means.clamp(min=SMALL * means.sum().item())).all())
