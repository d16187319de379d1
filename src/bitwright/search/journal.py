"""`Journal`: what a search has found so far, in memory and, where a folder is given, on disk.

The folder holds ``state.json`` (what the search is about, and the outcome of every finished trial) and one checkpoint,
the best model, in ``best-`` and the name of its trial. What an outcome holds is the search's own business: a dataclass
with a ``name``, of plain values. A checkpoint is written first, then the state that names it (to
a temporary name, flushed, renamed), then the earlier checkpoint is removed: whenever the process is killed, the state
on disk names a whole checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from bitwright.errors import CheckpointError
from bitwright.flow.checkpoint import load, save

STATE = "state.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate, and what came of it.

    ``holds`` says whether its drop is within the limit, ``low`` and ``high`` bound the drop where ``items`` were scored
    one by one. ``error`` is that of the outputs on the calibration data, relative and squared. ``failed`` says why a
    recipe could not be carried out; its numbers are then None.
    """

    name: str
    raised: int
    holds: bool
    score: float | None = None
    drop: float | None = None
    low: float | None = None
    high: float | None = None
    items: int | None = None
    bytes: int | None = None
    error: float | None = None
    seconds: float = 0.0
    note: str = ""
    failed: str = ""

    def __str__(self) -> str:
        if self.failed:
            return f"{self.name}: cannot be done here: {self.failed}"
        text = f"{self.name}: score {self.score:.4f}, drop {self.drop:+.4f}"
        if self.items is not None:
            text += f" [{self.low:+.4f}, {self.high:+.4f}] on {self.items:,} items"
        return f"{text}, {self.bytes:,} bytes, {self.seconds:.1f} s" + (f" ({self.note})" if self.note else "")


class Named(Protocol):
    """An outcome: a dataclass of plain values, its name among them."""

    @property
    def name(self) -> str:
        """The name of the trial, unlike all others of its search."""
        ...


Outcome = TypeVar("Outcome", bound=Named)


class Journal(Generic[Outcome]):
    """Finished trials in their order, each a ``kind``, and the best model.

    Raises `CheckpointError` for a folder that holds something else, is damaged, or belongs to another search: the
    message names what differs.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], kind: type[Outcome]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.trials: dict[str, Outcome] = {}
        self.best: Outcome | None = None
        self._model: nn.Module | None = None
        if folder is None:
            return
        state = _read(folder)
        if state is None:
            self._write()
        else:
            _check(state["identity"], json.loads(json.dumps(self.identity)), folder)
            self.trials = _outcomes(state, kind, folder)
            self.best = self.trials.get(state["best"])
        self._remove_leftovers()

    @property
    def place(self) -> Path | None:
        """The checkpoint of the best model."""
        return None if self.folder is None or self.best is None else self.folder / f"best-{slug(self.best.name)}"

    def model(self, float_model: nn.Module) -> nn.Module:
        """The best model, from memory or from its checkpoint."""
        if self._model is None:
            assert self.place is not None
            self._model = load(self.place, float_model)
        return self._model

    def add(self, trial: Outcome, model: nn.Module | None = None, *, is_best: bool = False) -> None:
        """Note a finished trial; its model is kept if it is the best one."""
        self.trials[trial.name] = trial
        if is_best:
            assert model is not None
            self.best, self._model = trial, model
            if self.place is not None:
                save(model, self.place)
        if self.folder is not None:
            self._write()
            self._remove_leftovers()

    def _write(self) -> None:
        assert self.folder is not None
        state = {
            "version": VERSION,
            "identity": self.identity,
            "best": None if self.best is None else self.best.name,
            "trials": [asdict(trial) for trial in self.trials.values()],  # type: ignore[call-overload]
        }
        part = self.folder / (STATE + ".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with part.open("w", encoding="utf-8") as file:
                json.dump(state, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.folder / STATE)
        except OSError as cause:
            raise CheckpointError(f"cannot write {self.folder / STATE}: {cause}") from cause

    def _remove_leftovers(self) -> None:
        """Checkpoints that are not the best one, and what a killed process left half written."""
        assert self.folder is not None
        for entry in self.folder.iterdir():
            if entry.is_dir() and entry != self.place and entry.name.startswith(("best-", ".best-")):
                shutil.rmtree(entry)


def slug(name: str) -> str:
    """The name of a trial as part of a file's name.

    >>> slug("gptq, 5 of 20 layers at 8 bits")
    'gptq-5-of-20-layers-at-8-bits'
    """
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


def _read(folder: Path) -> dict[str, Any] | None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; choose another one for the search")
    path = folder / STATE
    if not path.exists():
        found = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
        if [name for name in found if name != path.name + ".part"]:
            raise CheckpointError(f"{folder} holds {', '.join(found[:3])}: no search; choose another folder")
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["version"] != VERSION:
            raise ValueError(f"version {state['version']}, expected {VERSION}")
        if state["best"] is not None and state["best"] not in [entry["name"] for entry in state["trials"]]:
            raise ValueError(f"its best trial {state['best']!r} is not among its trials")
        if not isinstance(state["identity"], dict):
            raise TypeError("identity is no table")
    except (ValueError, KeyError, TypeError, OSError) as cause:
        raise CheckpointError(_damaged(path, cause)) from cause
    return state


def _outcomes(state: dict[str, Any], kind: type[Outcome], folder: Path) -> dict[str, Outcome]:
    try:
        return {entry["name"]: kind(**entry) for entry in state["trials"]}
    except (KeyError, TypeError) as cause:
        raise CheckpointError(_damaged(folder / STATE, cause)) from cause


def _damaged(path: Path, cause: Exception) -> str:
    return f"{path} is damaged or of another version: {cause}; delete the folder"


def _check(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    advice = "repeat the call that started it, delete the folder, or choose another one"
    for name in dict.fromkeys((*old, *new)):
        was, now = old.get(name, "nothing"), new.get(name, "nothing")
        if was == now:
            continue
        if isinstance(was, list) and isinstance(now, list):
            lines = [line for line in was if line not in now][:1], [line for line in now if line not in was][:1]
            was, now = (line[0] if line else "no such line" for line in lines)
        raise CheckpointError(f"{folder / STATE} was written with {name}: {was}; now it is: {now}; {advice}")
