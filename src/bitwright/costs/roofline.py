"""Latency and energy on machines that are not here, from a data file: a roofline, and a model of energy.

A layer takes as long as the slower of its two parts (Williams 2009, "Roofline"):
``max(operations / peak rate of the formats, bytes / bandwidth)``. A multiplication with its addition counts as two
operations; bytes are those of the weights with their scales, read once, of the input in its bits and of the output in
float32. Launches, caches and everything between layers are left out, so this is a lower bound that ranks layers and
formats; where the machine is at hand, measure it (`costs.latencies`).

A machine is a TOML file in ``machines/``, or one of your own. Formats that it has no kernel for run as what its first
fitting row says, at that rate. Energy is a model with a name, one file per model in ``energy/``, and no measurement.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.costs.choices import decided, module_at
from bitwright.costs.cost import Cost, Work, bits_of, layer_cost, work_of
from bitwright.errors import SearchError
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site, operator_of


@dataclass(frozen=True, slots=True)
class Rate:
    """Operations per second of pairs of formats (glob patterns over names and ``float``), and as what they run."""

    weight: tuple[str, ...]
    input: tuple[str, ...]
    runs_as: str
    peak: float
    source: str

    def covers(self, weight: QuantSpec | None, input: QuantSpec | None) -> bool:
        """Whether this row is about a pair."""
        pairs = ((_name(weight), self.weight), (_name(input), self.input))
        return all(any(fnmatchcase(name, pattern) for pattern in patterns) for name, patterns in pairs)


@dataclass(frozen=True, slots=True)
class EnergyModel:
    """Joules of a multiplication with its addition, by what it runs as, and of a byte from or to memory."""

    name: str
    source: str
    mac: Mapping[str, float]
    byte: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Peak rates, bandwidth in bytes per second, the sources of both, and a model of energy."""

    name: str
    description: str
    bandwidth: float
    source: str
    rates: tuple[Rate, ...]
    energy: EnergyModel

    def rate(self, weight: QuantSpec | None, input: QuantSpec | None) -> Rate:
        """The first row that covers a pair of formats; raises `SearchError` where there is none.

        >>> get_machine("a100").rate(QuantSpec.parse("int3/channel"), QuantSpec.parse("uint8/asym")).runs_as
        'int8'
        """
        for row in self.rates:
            if row.covers(weight, input):
                return row
        raise SearchError(
            f"machine {self.name} has no rate for weight {_name(weight)} with input {_name(input)}; add a row for them"
        )

    def roofline(self, module: nn.Module, work: Work, specs: Mapping[str, QuantSpec | None]) -> Cost:
        """Seconds and modelled joules of a layer with these specs by slot.

        >>> layer, work = nn.Linear(4096, 4096, bias=False), Work(4096**2, 4096, 4096)
        >>> seconds = get_machine("a100").roofline(layer, work, {"weight": None, "input": None}).latency
        >>> f"{1e6 * seconds:.1f} us"  # 64 MiB at 2,039 GB/s
        '32.9 us'
        """
        weights = [spec for slot, spec in specs.items() if Site("", slot).is_weight]
        inputs = [spec for slot, spec in specs.items() if not Site("", slot).is_weight] or [None]
        row = self.rate(max(weights or inputs, key=bits_of), max(inputs, key=bits_of))
        cost = layer_cost(module, work, dict(specs))
        stored = cost.bytes
        if operator_of(module) == "embedding":  # only the rows that are asked for are read
            stored = work.outputs * max(map(bits_of, weights)) / 8
        moved = stored + cost.live
        joules = work.macs * self.energy.mac[row.runs_as] + moved * self.energy.byte
        return Cost(latency=max(2 * work.macs / row.peak, moved / self.bandwidth), energy=joules)

    def prices(self, model: nn.Module, plan: Plan, example: Any, paths: Sequence[str]) -> RooflinePrices:
        """Rooflines of the layers at ``paths``, and of the other layers with the specs of ``plan``."""
        return RooflinePrices(self, model, plan, work_of(model, example), tuple(paths))


@dataclass(frozen=True, slots=True)
class RooflinePrices:
    """Rooflines of the layers of one model."""

    machine: Machine
    model: nn.Module
    plan: Plan
    work: Mapping[str, Work]
    chosen: tuple[str, ...]

    def layer(self, path: str, specs: Mapping[str, QuantSpec | None]) -> Cost:
        """Of one layer; a functional call has no counted operations and costs nothing."""
        if path not in self.work:
            return Cost()
        return self.machine.roofline(module_at(self.model, path), self.work[path], specs)

    def rest(self) -> Cost:
        """Of the layers without choices; what has no quantized form (norms, activation functions) is left out."""
        others = [path for path in self.work if path not in self.chosen]
        found = [self.layer(p, {site.slot: spec for site, spec in decided(self.plan, p).items()}) for p in others]
        return sum(found, Cost())


def machine_names() -> list[str]:
    """Names of all described machines, sorted.

    >>> machine_names()[:2]
    ['a100', 'apple-m1']
    """
    return sorted(entry.name.removesuffix(".toml") for entry in _folder("machines") if entry.name.endswith(".toml"))


def get_machine(name: str | Path) -> Machine:
    """The machine called ``name``, or described by a TOML file of yours.

    Raises `SearchError` for an unknown name, and for a file that is no description, naming what is missing or wrong.
    """
    if str(name).endswith(".toml"):
        return _machine(Path(name))
    if name not in machine_names():
        raise SearchError(
            f"unknown machine {str(name)!r}; known machines: {', '.join(machine_names())}; or name a .toml file"
        )
    return _machine(resources.files("bitwright.costs") / "machines" / f"{name}.toml")


def _folder(name: str) -> list[Traversable]:
    return list((resources.files("bitwright.costs") / name).iterdir())


def _machine(file: Traversable) -> Machine:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        rows = tuple(
            Rate(tuple(row["weight"]), tuple(row["input"]), row["runs_as"], _positive(row, "peak"), row["source"])
            for row in data["rates"]
        )
        energy = _energy(data["energy"])
        missing = [row.runs_as for row in rows if row.runs_as not in energy.mac]
        if missing:
            raise ValueError(f"energy model {energy.name} says nothing of {missing[0]}")
        return Machine(data["name"], data["description"], _positive(data, "bandwidth"), data["source"], rows, energy)
    except KeyError as cause:
        raise SearchError(f"machine {file}: {cause} is missing; see the files in bitwright/costs/machines") from cause
    except (OSError, ValueError, TypeError, AttributeError) as cause:
        raise SearchError(f"machine {file} cannot be read: {cause}") from cause


def _energy(name: str) -> EnergyModel:
    known = {entry.name.removesuffix(".toml"): entry for entry in _folder("energy") if entry.name.endswith(".toml")}
    if name not in known:
        raise ValueError(f"unknown energy model {name!r}; known: {', '.join(sorted(known))}")
    data = tomllib.loads(known[name].read_text(encoding="utf-8"))
    return EnergyModel(
        data["name"], data["source"], {key: row["joules"] for key, row in data["mac"].items()}, data["byte"]
    )


def _positive(table: Mapping[str, Any], key: str) -> float:
    if not (isinstance(table[key], (int, float)) and table[key] > 0):
        raise ValueError(f"{key} must be a positive number, got {table[key]!r}")
    return float(table[key])


def _name(spec: QuantSpec | None) -> str:
    return "float" if spec is None else spec.format.name
