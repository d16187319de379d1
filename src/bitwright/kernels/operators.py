"""How native functions become torch operators of the library ``bitwright``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("bitwright", "DEF")


def register(
    schema: str, run: Callable[..., Tensor], shape: Callable[..., Tensor], keys: tuple[str, ...] = ("CPU",)
) -> None:
    """Define ``bitwright::<schema>``, run by ``run`` on devices of ``keys``; ``shape`` gives an empty result."""
    name = _LIBRARY.define(schema)
    for key in keys:
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"bitwright::{name}", shape, lib=_LIBRARY)


def address(x: Tensor | None) -> int:
    """Where a tensor's elements lie in memory; 0 for None."""
    return 0 if x is None else x.data_ptr()
