"""`save` and `load`: a folder with ``plan.toml`` (decisions) and ``model.safetensors`` (numbers), nothing executable.

Both prepared and converted models can be saved. The folder is written under a temporary name and renamed, so a full
disk or an interrupt never leaves half a checkpoint. Tensors that a model shares (tied weights) are stored once; the
file's metadata maps the other names to them.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from safetensors.torch import save_file
from torch import Tensor, nn

from bitwright.errors import BitwrightError, CheckpointError
from bitwright.flow.convert import convert, is_converted
from bitwright.flow.prepare import plan_of, prepare
from bitwright.lowbit.attention import Operand
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.layer import LowbitLayer
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.plan.plan import Plan

VERSION = "1"
PLAN, TENSORS = "plan.toml", "model.safetensors"


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a prepared or converted model; an earlier checkpoint in ``folder`` is replaced at the end, in one step.

    Raises `CheckpointError` when the folder cannot be written or holds anything but an earlier checkpoint.
    """
    plan = plan_of(model)
    tensors, metadata = _contents(model)
    try:
        place = Path(folder).resolve()
        _check_place(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"cannot write {str(folder)!r}: {cause}") from cause
    try:
        plan.save(part / PLAN)
        save_file(tensors, part / TENSORS, metadata)
        part.chmod(0o755)
        _put(part, place)
    except (OSError, SafetensorError) as cause:
        raise CheckpointError(f"cannot write {folder}: {cause}") from cause
    finally:
        shutil.rmtree(part, ignore_errors=True)


def file_bytes(model: nn.Module) -> int:
    """Bytes of the ``model.safetensors`` that `save` would write: all tensors, their names, and the metadata."""
    tensors, metadata = _contents(model)
    return len(serialized(tensors, metadata))


def _contents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a model's file."""
    tensors, aliases = _distinct(model.state_dict())
    metadata = {
        "format": "bitwright",
        "version": VERSION,
        "kind": _kind(model),
        "aliases": json.dumps(aliases),
    }
    return tensors, metadata


def _check_place(folder: Path) -> None:
    """Only a checkpoint may be replaced, and nothing else may be lost with it."""
    if folder.is_dir():
        found = sorted(entry.name for entry in folder.iterdir())
        if found in ([], sorted((PLAN, TENSORS))):
            return
        raise CheckpointError(f"{folder} holds {', '.join(found[:3])}: no bitwright checkpoint; choose another folder")
    if folder.exists():
        raise CheckpointError(f"{folder} exists and is no bitwright checkpoint; choose another folder")


def _put(part: Path, folder: Path) -> None:
    """Rename ``part`` to ``folder``; an earlier checkpoint is swapped with it, so that ``folder`` is never missing."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(part, folder)
    elif not _swap(part, folder):  # elsewhere than on Linux two renames must do
        old = part.with_name(part.name + ".old")
        os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, where the system can."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def load(folder: str | Path, model: nn.Module, *, features: frozenset[str] | None = None) -> nn.Module:
    """The saved model, rebuilt on ``model``: the float model from the user's own code, whose values do not matter.

    ``features`` is passed to `convert`. Raises `CheckpointError` for a folder that is missing, corrupt, foreign, or
    made for another model.
    """
    folder = Path(folder)
    tensors, metadata = read_tensors(folder / TENSORS)
    kind, aliases = _understood(metadata, tensors, folder / TENSORS)
    try:
        rebuilt = prepare(model, Plan.load(folder / PLAN))
        if kind != "float":
            for module in rebuilt.modules():
                if isinstance(module, Quantizer):
                    module.stage = Stage.SIMULATE
        if kind == "converted":
            rebuilt = convert(rebuilt, inplace=True, features=features)
    except BitwrightError as cause:
        raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {cause}") from cause
    tensors |= {alias: tensors[name] for alias, name in aliases.items()}
    for name, dtype in _types(rebuilt).items():
        if name in tensors and tensors[name].dtype != dtype:
            found = f"{name} is {tensors[name].dtype}, expected {dtype}"
            raise CheckpointError(f"{folder / TENSORS} does not fit {type(model).__name__}: {found}")
    try:
        rebuilt.load_state_dict(tensors)
    except RuntimeError as cause:
        raise CheckpointError(f"{folder / TENSORS} does not fit {type(model).__name__}: {cause}") from cause
    _check_scales(rebuilt, folder / TENSORS)
    return rebuilt


def _types(model: nn.Module) -> dict[str, torch.dtype]:
    """The type of each tensor of a model's state dict, by name, without computing any."""
    types: dict[str, torch.dtype] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = {
            name: part.dtype
            for name, part in (*module._parameters.items(), *module._buffers.items())
            if part is not None
        }
        if isinstance(module, LowbitLayer):
            own |= {name: dtype for name, (_, dtype) in module.stored_as.items()}
        types |= {f"{path}.{name}" if path else name: dtype for name, dtype in own.items()}
    return types


def _check_scales(model: nn.Module, path: Path) -> None:
    """Shipped scales are positive; those in training may be driven below 0, where they count as the smallest."""
    for name, module in model.named_modules():
        shipped = isinstance(module, (LowbitLayer, LowbitAdd, Operand))
        if not shipped and not isinstance(module, Quantizer):
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if isinstance(module, LowbitLayer) and module.weight_spec.scale is None:
            own.append(("weight_scale", module.weight_scale))
        for part, value in own:
            if "scale" not in part or part.startswith("kernel_") or not value.is_floating_point():
                continue
            good = value.isfinite() & (value > 0) if shipped else value.isfinite()
            if not bool(good.all()):
                found = value[~good].flatten()[0].item()
                raise CheckpointError(
                    f"{path} is corrupt: {name}.{part} holds {found}, expected positive finite scales"
                )


def _understood(metadata: dict[str, str], tensors: dict[str, Tensor], path: Path) -> tuple[str, dict[str, str]]:
    """Kind of model and names of shared tensors, from the metadata that `save` wrote."""
    if metadata.get("format") != "bitwright" or metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} was not written by this version of bitwright (format {metadata.get('format')!r}, "
            f"version {metadata.get('version')!r}; expected 'bitwright', {VERSION!r})"
        )
    kind = metadata.get("kind", "")
    try:
        aliases = json.loads(metadata.get("aliases", ""))
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"{path} is corrupt: its metadata 'aliases' is no JSON: {cause}") from cause
    found = isinstance(aliases, dict) and all(isinstance(n, str) and n in tensors for n in aliases.values())
    if not found or kind not in ("float", "prepared", "converted"):
        raise CheckpointError(f"{path} is corrupt: its metadata has kind {kind!r} and aliases {str(aliases)[:80]}")
    return kind, aliases


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a float checkpoint into ``model`` in place: ``.safetensors``, or a state dict written by `torch.save`.

    A state dict under a ``state_dict`` key and names that start with ``module.`` (data-parallel training) are
    understood. Nothing executable is loaded. Raises `CheckpointError`.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state = read_tensors(path)[0]
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as cause:
            raise CheckpointError(f"cannot read {path} as a state dict of tensors: {cause}") from cause
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a state dict (name -> tensor)")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    except (RuntimeError, AttributeError) as cause:
        model.load_state_dict(before)  # torch copies what fits before it complains
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {cause}") from cause
    return model


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file; raises `CheckpointError`."""
    try:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; expected a file written by bitwright.save or safetensors")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(f"{path} is corrupt or no safetensors file: {cause}") from cause


def _kind(model: nn.Module) -> str:
    if is_converted(model):
        return "converted"
    stages = {module.stage for module in model.modules() if isinstance(module, Quantizer)}
    return "prepared" if stages == {Stage.SIMULATE} else "float"


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each stored tensor once, and the names that share it."""
    first: dict[tuple[object, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} is a {type(value).__name__}; only tensors can be saved")
        key = (value.data_ptr(), value.shape, value.dtype, value.stride())
        if value.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            alone = value.nbytes == value.untyped_storage().nbytes()  # safetensors refuses tensors that overlap
            tensors[name] = (value if alone else value.clone()).detach().contiguous()
    return tensors, aliases
