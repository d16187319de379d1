"""Find the objects that a user names on the command line as ``package.module:name``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.errors import BitwrightError, CheckpointError
from bitwright.flow.checkpoint import load, load_weights
from bitwright.flow.convert import is_converted


def load_object(name: str) -> Any:
    """The object called ``package.module:name``; the current folder is importable.

    Raises `BitwrightError` that says which part was not found.

    >>> load_object("math:sqrt")(4.0)
    2.0
    """
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise BitwrightError(f"{name!r} is not of the form package.module:name, e.g. mymodel:build")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as cause:
        raise BitwrightError(
            f"cannot import {module_name!r} for {name!r}: {cause}; run from the folder that holds it"
        ) from cause
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise BitwrightError(f"module {module_name!r} has no {attribute!r}; it has {_public(found)}")
        found = getattr(found, part)
    return found


def model_of(name: str, weights: Path | None = None) -> nn.Module:
    """The model, in eval mode, that a factory or module object of this name gives, with weights from a file."""
    made = load_object(name)
    model = made if isinstance(made, nn.Module) else made()
    if not isinstance(model, nn.Module):
        raise BitwrightError(f"{name} returned a {type(model).__name__}; expected a torch.nn.Module")
    return (load_weights(model, weights) if weights is not None else model).eval()


def shipped_of(folder: Path, model: str) -> nn.Module:
    """The converted model in a folder; raises `CheckpointError` for a simulated one."""
    shipped = load(folder, model_of(model))
    if not is_converted(shipped):
        raise CheckpointError(f"{folder} holds a simulated model; run bitwright convert on it first")
    return shipped


def batches_of(name: str) -> Any:
    """The batches that a function or object of this name gives."""
    made: Any = load_object(name)
    return made() if callable(made) else made


def first_of(name: str) -> Any:
    """The first of these batches; raises `BitwrightError` where there is none."""
    for batch in batches_of(name):
        return batch
    raise BitwrightError(f"{name} gave no batches; it must return at least one batch of model inputs")


def _public(module: object) -> str:
    return ", ".join(name for name in dir(module) if not name.startswith("_")) or "no public names"
