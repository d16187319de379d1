"""`LowbitMultiheadAttention`: the shipped `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from bitwright.graph.multihead import CHILD, SIDES, Multihead, Side


class LowbitMultiheadAttention(Multihead):
    """Bit for bit what `nn.multihead.QMultiheadAttention` simulates.

    The input projections are children named after the slot of their weight: ``in_proj_weight`` with one part per side,
    or ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight``; `nn.Linear` where the plan leaves them in float.
    """

    in_proj_bias = None  # encoder layers ask for it before they hand weights to a fused kernel
    _qkv_same_embed_dim = False

    def __init__(self, module: nn.MultiheadAttention, parts: Mapping[Side, tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.batch_first = module.num_heads, module.dropout, module.batch_first
        self.add_zero_attn = module.add_zero_attn
        for name in ("bias_k", "bias_v"):
            bias = getattr(module, name)
            self.register_buffer(name, None if bias is None else bias.detach().clone())
        for side in SIDES:
            slot, part = parts[side]
            if slot != "in_proj_weight":
                self.add_module(slot, part)
        if parts["query"][0] == "in_proj_weight":
            self.in_proj_weight = nn.ModuleList(parts[side][1] for side in SIDES)
        self.attention_0, self.out_proj = module.get_submodule(CHILD), module.out_proj

    def project(self, side: Side, x: Tensor) -> Tensor:
        """The input projection of one side."""
        joint = getattr(self, "in_proj_weight", None)
        part = self.get_submodule(f"{side[0]}_proj_weight") if joint is None else joint[SIDES.index(side)]
        return part(x)
