"""Find the objects that a user names on the command line as ``package.module:name``."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from bitwright.errors import BitwrightError


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


def _public(module: object) -> str:
    return ", ".join(name for name in dir(module) if not name.startswith("_")) or "no public names"
