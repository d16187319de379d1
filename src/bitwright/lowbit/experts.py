"""`LowbitExperts`: the shipped experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bitwright.graph.experts import mixture


class LowbitExperts(nn.Module):
    """Bit for bit what `nn.experts.QExperts` simulates; ``gate_up_proj`` and ``down_proj`` hold a layer per expert."""

    def __init__(self, gate_up_proj: Sequence[nn.Module], down_proj: Sequence[nn.Module], act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.ModuleList(gate_up_proj), nn.ModuleList(down_proj)
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, features]`` with chosen experts and their shares, ``[tokens, k]`` each."""

        def gate_up(expert: int, x: Tensor) -> Tensor:
            return self.gate_up_proj[expert](x)

        def down(expert: int, x: Tensor) -> Tensor:
            return self.down_proj[expert](x)

        count = len(self.down_proj)
        return mixture(hidden_states, top_k_index, top_k_weights, count, gate_up, down, self.act_fn)
