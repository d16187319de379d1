"""The meaning of LSTM and GRU in plain torch: one loop over time that simulated and shipped layers both run.

The loop is given its products (``x @ W.T + b``) as functions and does the rest in float32: gates, nonlinearities and
the cell state, in which errors would add up over time. So where the products agree bit for bit, whole sequences do.
The products of a layer's input are one call for all time steps, those of its hidden state one call per step.

Sequences are processed as rows ordered by time, the form of `torch.nn.utils.rnn.PackedSequence`: step t holds the
next elements of those ``sizes[t]`` sequences that are that long, longest first. Padding never reaches a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from bitwright.errors import KernelError

Product = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]


class Products(NamedTuple):
    """What one direction of one layer multiplies: its input, its hidden state, and (with ``proj_size``) its output."""

    input: Product
    hidden: Product
    projection: Product | None


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The shape of an `nn.LSTM` or `nn.GRU`: everything but the numbers."""

    mode: Literal["LSTM", "GRU"]
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Ends of the parameter names, in the order of the states: ``l0``, ``l0_reverse``, ``l1``, ..."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return tuple(f"l{layer}{end}" for layer in range(self.num_layers) for end in ends)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Features of the hidden state, and of an LSTM's cell state."""
        hidden = self.proj_size or self.hidden_size
        return (hidden, self.hidden_size) if self.mode == "LSTM" else (hidden,)

    def weights(self, suffix: str) -> tuple[tuple[str, str], ...]:
        """``(weight slot, activation slot)`` of the products of one direction of one layer, in the order of `Products`.

        >>> recurrence_of(nn.GRU(2, 3)).weights("l0")
        (('weight_ih_l0', 'input_l0'), ('weight_hh_l0', 'hidden_l0'))
        """
        pairs = (f"weight_ih_{suffix}", f"input_{suffix}"), (f"weight_hh_{suffix}", f"hidden_{suffix}")
        return (*pairs, (f"weight_hr_{suffix}", f"projected_{suffix}")) if self.proj_size else pairs


def recurrence_of(module: nn.RNNBase) -> Recurrence:
    """The shape of an `nn.LSTM` or `nn.GRU`."""
    assert module.mode in ("LSTM", "GRU")
    return Recurrence(
        module.mode, module.input_size, module.hidden_size, module.proj_size, module.num_layers,
        module.bias, module.batch_first, float(module.dropout), module.bidirectional,
    )  # type: ignore[arg-type]  # fmt: skip


def lstm_cell(gates: Tensor, products: Products, state: State) -> State:
    """One LSTM step: ``i, f, g, o = gates + W_hh h``; ``c' = sig(f) c + sig(i) tanh(g)``; ``h' = sig(o) tanh(c')``.

    ``gates`` is ``W_ih x + b_ih`` of this step, ``[n, 4 * hidden]``; with a projection ``h' = W_hr (sig(o) tanh(c'))``
    (Sak 2014, 1402.1128).
    """
    hidden, cell = state
    i, f, g, o = (gates + products.hidden(hidden)).chunk(4, 1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    hidden = torch.sigmoid(o) * torch.tanh(cell)
    return (hidden if products.projection is None else products.projection(hidden)), cell


def gru_cell(gates: Tensor, products: Products, state: State) -> State:
    """One GRU step: ``r, z = sig(gates + W_h h)``; ``n = tanh(W_in x + b_in + r (W_hn h + b_hn))``; ``n + z (h - n)``.

    The reset gate multiplies the hidden product with its bias, so the two biases of n stay apart (Cho 2014, in the
    form of cuDNN and `nn.GRU`).
    """
    [hidden] = state
    size = hidden.shape[1]
    inner, outer = gates, products.hidden(hidden)
    r, z = torch.sigmoid(inner[:, : 2 * size] + outer[:, : 2 * size]).chunk(2, 1)
    new = torch.tanh(inner[:, 2 * size :] + r * outer[:, 2 * size :])
    return (new + z * (hidden - new),)


CELLS = {"LSTM": lstm_cell, "GRU": gru_cell}


def run(
    shape: Recurrence,
    products: Callable[[str, Tensor, Sequence[int]], Products],
    input: Tensor | PackedSequence,
    state: Tensor | State | None,
    *,
    training: bool,
) -> tuple[Tensor | PackedSequence, Tensor | State]:
    """Outputs and final state, as `nn.LSTM` and `nn.GRU` take and return them: packed, unbatched or batch first.

    ``products(suffix, rows, sizes)`` gives the products of a layer and direction whose input is ``rows``. Raises
    `KernelError` for inputs and states of another shape.
    """
    rows, sizes, batched = _rows(shape, input)
    states = _states(shape, input, state, sizes[0], batched, rows)
    finals: list[State] = []
    for layer in range(shape.num_layers):
        ends = shape.suffixes[len(finals) :][: 2 if shape.bidirectional else 1]
        if layer and training and shape.dropout:
            rows = F.dropout(rows, shape.dropout)
        outs = []
        for end in ends:
            start = tuple(part[len(finals)] for part in states)
            out, final = _direction(
                CELLS[shape.mode], products(end, rows, sizes), rows, sizes, start, end.endswith("_reverse")
            )
            outs.append(out)
            finals.append(final)
        rows = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
    parts = tuple(torch.stack(part) for part in zip(*finals, strict=True))
    if isinstance(input, PackedSequence):
        if input.unsorted_indices is not None:
            parts = tuple(part.index_select(1, input.unsorted_indices) for part in parts)
        return input._replace(data=rows), parts if shape.mode == "LSTM" else parts[0]
    out = rows.view(len(sizes), sizes[0], -1)
    out = out.transpose(0, 1) if shape.batch_first and batched else out
    if not batched:
        out, parts = out.squeeze(1), tuple(part.squeeze(1) for part in parts)
    return out, parts if shape.mode == "LSTM" else parts[0]


def _rows(shape: Recurrence, input: Tensor | PackedSequence) -> tuple[Tensor, list[int], bool]:
    """Rows ``[n, features]`` ordered by time, the number of them in each step, and whether there is a batch axis."""
    if isinstance(input, PackedSequence):
        rows, sizes, batched = input.data, input.batch_sizes.tolist(), True
    else:
        if input.dim() not in (2, 3):
            raise KernelError(
                f"an {shape.mode} takes 2-d (unbatched) or 3-d inputs, got a tensor of {list(input.shape)}"
            )
        batched = input.dim() == 3
        steps = input if batched else input.unsqueeze(1)
        steps = steps.transpose(0, 1) if shape.batch_first and batched else steps
        rows, sizes = steps.reshape(-1, steps.shape[-1]), [steps.shape[1]] * len(steps)
    if rows.shape[-1] != shape.input_size or not len(rows):
        found = list(rows.shape if isinstance(input, PackedSequence) else input.shape)
        raise KernelError(
            f"this {shape.mode} takes sequences of at least one step with {shape.input_size} features, got {found}"
        )
    return rows.float().contiguous(), sizes, batched


def _states(
    shape: Recurrence,
    input: Tensor | PackedSequence,
    state: Tensor | State | None,
    batch: int,
    batched: bool,
    rows: Tensor,
) -> State:
    """The initial states ``[layers * directions, batch, features]``, zeros where none are given, sorted as the rows."""
    count = len(shape.suffixes)
    if state is None:
        return tuple(rows.new_zeros(count, batch, size) for size in shape.state_sizes)
    parts = (state,) if isinstance(state, Tensor) else tuple(state)
    wanted = [[count, batch, size] if batched else [count, size] for size in shape.state_sizes]
    if [list(part.shape) for part in parts] != wanted:
        raise KernelError(f"this {shape.mode} takes states of {wanted}, got {[list(part.shape) for part in parts]}")
    parts = tuple(part.float() if batched else part.float().unsqueeze(1) for part in parts)
    if isinstance(input, PackedSequence) and input.sorted_indices is not None:
        parts = tuple(part.index_select(1, input.sorted_indices) for part in parts)
    return parts


def _direction(
    cell: Callable[[Tensor, Products, State], State],
    products: Products,
    rows: Tensor,
    sizes: Sequence[int],
    start: State,
    reverse: bool,
) -> tuple[Tensor, State]:
    """All steps of one layer and direction: outputs ``[n, features]`` in the order of ``rows``, and the final state.

    Forward, sequences end one by one and their last states are put aside; in reverse they begin one by one.
    """
    steps = products.input(rows).float().split(list(sizes))
    outs: list[Tensor] = []
    ended: list[State] = []
    state = tuple(part[: sizes[-1 if reverse else 0]].contiguous() for part in start)
    for gates in reversed(steps) if reverse else steps:
        alive, size = len(state[0]), len(gates)
        if size < alive:
            ended.append(tuple(part[size:] for part in state))
            state = tuple(part[:size] for part in state)
        elif size > alive:
            state = tuple(torch.cat([part, new[alive:size]]) for part, new in zip(state, start, strict=True))
        state = cell(gates, products, state)
        outs.append(state[0])
    final = tuple(torch.cat([part, *(end[i] for end in reversed(ended))]) for i, part in enumerate(state))
    return torch.cat(outs[::-1] if reverse else outs), final
