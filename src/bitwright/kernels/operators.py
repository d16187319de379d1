"""How native functions become torch operators of the library ``bitwright``, in Python or in C++.

Where the package was built with ``BITWRIGHT_TORCH_OPS`` the library ``_torch_ops`` (``csrc/torch_ops.cpp``) lies beside
the native module. It defines the operators of `IN_CPP`, and Python adds what compilers ask for, their shapes. Other
operators, and all where that library is missing, are defined and run by the Python functions given to `register`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import KernelError, NumericsError

IN_CPP = ("linear", "grouped_linear", "decoded_linear", "conv2d", "add")
"""Operators of ``_torch_ops``: what converted models call on the CPU. Those of training and of GPUs stay in Python."""

_LIBRARY = torch.library.Library("bitwright", "DEF")


def library() -> Path | None:
    """The file of the C++ operators that belongs to this installation, if one was built."""
    native = importlib.util.find_spec("bitwright._native")
    if native is None or native.origin is None:
        return None
    return next(iter(sorted(Path(native.origin).parent.glob("_torch_ops.*"))), None)


def implementation() -> str:
    """What runs the operators of `IN_CPP`: ``"C++"`` or ``"Python"``.

    >>> implementation() in ("C++", "Python")
    True
    """
    return "C++" if _CPP else "Python"


def register(
    schema: str, run: Callable[..., Tensor], shape: Callable[..., Tensor], keys: tuple[str, ...] = ("CPU",)
) -> None:
    """Define ``bitwright::<schema>``, run by ``run`` on devices of ``keys``; ``shape`` gives an empty result.

    Operators that the C++ library defines are compared with ``schema``: another one raises `KernelError`.
    """
    name = schema.partition("(")[0]
    if _CPP and name in IN_CPP:
        _compare(name, schema)
    else:
        _LIBRARY.define(schema)
        for key in keys:
            _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"bitwright::{name}", shape, lib=_LIBRARY)


def call(operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Run an operator; what C++ refuses is raised as the `KernelError` or `NumericsError` that Python raises."""
    try:
        return operator(*arguments)
    except ValueError as error:
        raise KernelError(str(error)) from error
    except OverflowError as error:  # of the range of a dynamic quantizer
        raise NumericsError(str(error)) from error


def address(x: Tensor | None) -> int:
    """Where a tensor's elements lie in memory; 0 for None."""
    return 0 if x is None else x.data_ptr()


def _load() -> bool:
    """Whether C++ operators serve: they do where the process has loaded them or they lie beside the native module."""
    if any(_schema(name) for name in IN_CPP):
        return True
    path = library()
    if path is None:
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise KernelError(
            f"{path} does not load with torch {torch.__version__} ({error.__cause__}); {_REMEDY}"
        ) from error
    return True


def _compare(name: str, schema: str) -> None:
    found, expected = _schema(name), str(torch._C.parse_schema(f"bitwright::{schema}"))
    if found != expected:
        raise KernelError(
            f"the C++ operators are not those of this version of bitwright: found {found or f'no bitwright::{name}'}, "
            f"expected {expected}; {_REMEDY}"
        )


def _schema(name: str) -> str:
    """The schema of an operator that is defined, or nothing."""
    packet = getattr(torch.ops.bitwright, name, None)
    return "" if packet is None else str(packet.default._schema)


_REMEDY = "build bitwright again with BITWRIGHT_TORCH_OPS=ON, or delete the file to run the operators from Python"
_CPP = _load()
