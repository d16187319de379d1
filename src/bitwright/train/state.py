"""The file of an interrupted run: one safetensors file with all tensors, and the rest as JSON in its metadata.

Nothing executable is stored or loaded. The file is written under a temporary name, flushed to the disk and renamed, so
a kill or a full disk leaves the earlier one. A checksum over everything tells a damaged file from a good one.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.flow.checkpoint import read_tensors

NAME = "training.safetensors"
VERSION = "1"


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a tree of dicts, lists, numbers, texts and tensors; raises `CheckpointError` when it cannot."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(state, "state", tensors))
    metadata = {"format": "bitwright-training", "version": VERSION, "state": text, "crc32": _checksum(text, tensors)}
    part = folder / (NAME + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata)
        _flush(part)
        part.replace(folder / NAME)
        _flush(folder)
    except (OSError, SafetensorError) as cause:
        raise CheckpointError(f"cannot write {folder / NAME}: {cause}") from cause


def read_state(folder: Path) -> dict[str, Any] | None:
    """The tree that `write_state` wrote, None where there is none; raises `CheckpointError` for a damaged file."""
    path = folder / NAME
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; choose another one for the checkpoint")
    if not path.exists():
        return None
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != "bitwright-training" or metadata.get("version") != VERSION:
        raise CheckpointError(f"{path} was not written by this version of bitwright.train; choose another folder")
    text = metadata.get("state", "")
    if metadata.get("crc32") != _checksum(text, tensors):
        raise CheckpointError(f"{path} is damaged (checksum differs); delete it to start again from the model as it is")
    return _tree(json.loads(text), tensors)


def _plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, its tensors put aside; dicts become lists of pairs, which keep keys that are numbers."""
    if isinstance(value, Tensor):
        while name in tensors:  # "a.b" and "b" in "a" read alike
            name += "_"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _plain(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"{name} is a {type(value).__name__}; a checkpoint holds tensors, numbers and texts only")


def _tree(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_tree(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _tree(item, tensors) for key, item in content}
    return tuple(_tree(item, tensors) for item in content)


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        if value.numel():
            crc = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
