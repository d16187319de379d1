"""Checkpoint files written to break the reader: always a `CheckpointError`, never a half-changed model."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitwright.errors import CheckpointError
from bitwright.flow.checkpoint import load, load_weights, save
from bitwright.flow.convert import convert
from models import Mlp, TiedLayers
from nets import calibrated, one_thread  # noqa: F401

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module", params=["converted", "prepared"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = calibrated(Mlp(), "w4a8", [torch.randn(4, 16)])
    path = tmp_path_factory.mktemp("good") / "model"
    save(convert(model) if request.param == "converted" else model, path)
    return path


def refused(folder: Path, net: nn.Module, message: str = "") -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    classes = [type(module) for module in net.modules()]
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder, net)
    assert str(folder) in str(caught.value)
    assert [type(module) for module in net.modules()] == classes
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def copied(folder: Path, to: Path, raw: bytes | None = None) -> Path:
    to.mkdir()
    (to / "plan.toml").write_bytes((folder / "plan.toml").read_bytes())
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() if raw is None else raw)
    return to


def rewritten(folder: Path, to: Path, change: Callable[[Tensors, dict[str, str]], object]) -> Path:
    path = copied(folder, to) / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return to


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -1, -100])
def test_a_truncated_file_is_corrupt(size: int, folder: Path, tmp_path: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    refused(copied(folder, tmp_path / "m", raw[:size]), Mlp(), "is corrupt or no safetensors file")


HEADERS: dict[str, bytes] = {
    "header larger than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "header of 2**64 - 1 bytes": b"\xff" * 8,
    "no json": struct.pack("<Q", 4) + b"abcd",
    "json of another kind": struct.pack("<Q", 8) + b"[1,2,3] ",
    "bomb": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "offsets outside": struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}     ',
    "offsets reversed": struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[9,0]}}      ',
    "shape that overflows": struct.pack("<Q", 90)
    + b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'.ljust(90),
    "unknown type": struct.pack("<Q", 60) + b'{"a":{"dtype":"Q99","shape":[0],"data_offsets":[0,0]}}      ',
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "zip": b"PK\x03\x04" + b"\x00" * 60,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies_is_corrupt(kind: str, folder: Path, tmp_path: Path) -> None:
    refused(copied(folder, tmp_path / "m", HEADERS[kind]), Mlp(), "is corrupt or no safetensors file")
    (tmp_path / "w.safetensors").write_bytes(HEADERS[kind])
    with pytest.raises(CheckpointError, match=r"w\.safetensors is corrupt"):
        load_weights(Mlp(), tmp_path / "w.safetensors")


def first(tensors: Tensors, ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


CHANGES: dict[str, tuple[Callable[[Tensors, dict[str, str]], object], str]] = {
    "missing tensor": (lambda t, m: t.pop(first(t, "bias")), r"does not fit Mlp: .*Missing key"),
    "extra tensor": (lambda t, m: t.update(extra=torch.zeros(3)), r"does not fit Mlp: .*Unexpected key"),
    "other shape": (lambda t, m: t.update({first(t, "bias"): torch.zeros(5)}), "does not fit Mlp: .*size mismatch"),
    "transposed": (lambda t, m: t.update({"4.weight": torch.zeros(32, 4)}), "does not fit Mlp: .*size mismatch"),
    "scalar": (lambda t, m: t.update({first(t, "scale"): torch.tensor(1.0)}), "does not fit Mlp: .*size mismatch"),
    "integers for floats": (lambda t, m: t.update({"4.bias": torch.zeros(4).int()}), r"4\.bias is torch\.int32, exp"),
    "doubles": (lambda t, m: t.update({first(t, "scale"): t[first(t, "scale")].double()}), r"scale is torch\.float64"),
    "halves": (lambda t, m: t.update({"4.weight": t["4.weight"].half()}), r"4\.weight is torch\.float16, exp"),
    "renamed": (lambda t, m: t.update({"4.weights": t.pop("4.weight")}), r"does not fit Mlp: .*Missing key"),
    "no tensors": (lambda t, m: t.clear(), r"does not fit Mlp: .*Missing key"),
    "no metadata": (lambda t, m: m.clear(), r"was not written by this version of bitwright .format None, version None"),
    "other format": (lambda t, m: m.update(format="pt"), "was not written by this version of bitwright .format 'pt'"),
    "other version": (lambda t, m: m.update(version="2"), "version '2'; expected 'bitwright', '1'"),
    "no kind": (lambda t, m: m.pop("kind"), "is corrupt: its metadata has kind ''"),
    "odd kind": (lambda t, m: m.update(kind="pickled"), "is corrupt: its metadata has kind 'pickled'"),
    "no aliases": (lambda t, m: m.pop("aliases"), "is corrupt: its metadata 'aliases' is no JSON"),
    "broken aliases": (lambda t, m: m.update(aliases="{'a': "), "is corrupt: its metadata 'aliases' is no JSON"),
    "aliases bomb": (lambda t, m: m.update(aliases="[" * 100_000), "is corrupt: its metadata 'aliases' is no JSON"),
    "aliases as list": (lambda t, m: m.update(aliases="[1, 2]"), r"kind '\w+' and aliases \[1, 2\]"),
    "aliases as null": (lambda t, m: m.update(aliases="null"), "is corrupt: its metadata has kind"),
    "alias of a number": (lambda t, m: m.update(aliases='{"a": 1}'), "is corrupt: its metadata has kind"),
    "alias of a list": (lambda t, m: m.update(aliases='{"a": ["4.bias"]}'), "is corrupt: its metadata has kind"),
    "alias to nowhere": (lambda t, m: m.update(aliases='{"a": "nowhere"}'), r"aliases \{'a': 'nowhere'\}"),
    "needless alias": (lambda t, m: m.update(aliases='{"a": "4.bias"}'), r"does not fit Mlp: .*Unexpected key"),
    "alias of other shape": (lambda t, m: m.update(aliases='{"4.bias": "4.weight"}'), "does not fit Mlp: .*size mis"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_contents_that_do_not_fit_are_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    change, message = CHANGES[kind]
    refused(rewritten(folder, tmp_path / "m", change), Mlp(), f"(?s){message}")


def test_the_other_kind_of_model_under_the_same_plan_is_refused(folder: Path, tmp_path: Path) -> None:
    def exchange(tensors: Tensors, metadata: dict[str, str]) -> None:
        metadata["kind"] = "converted" if metadata["kind"] == "prepared" else "prepared"

    refused(rewritten(folder, tmp_path / "m", exchange), Mlp(), "(?s)does not fit Mlp: .*Missing key")


PLANS = {
    "empty": ("", "cannot read plan"),
    "bomb": ("a = " + "[" * 100_000, "cannot read plan"),
    "other sites": ('version = 1\n[sites]\n"conv.weight" = "int8"\n', "does not fit Mlp: the plan names conv"),
    "other bits": ('version = 1\n[sites]\n"0.weight" = "int3/channel"\n"0.input" = "float"\n', "does not fit Mlp"),
    "fold that cannot be": (
        'version = 1\n[sites]\n"0.weight" = "int8/channel"\n"0.input" = "uint8/asym"\n[folds]\n"0" = "2"\n',
        r"does not fit Mlp: \[folds\] 0 = 2",
    ),
    "weights that are not shared": (
        'version = 1\n[sites]\n"0.weight" = "int8"\n"0.input" = "int8"\n"2.weight" = "int8"\n"2.input" = "int8"\n'
        '[shared]\n"2.weight" = "0.weight"\n',
        r"does not fit Mlp: \[shared\] 2\.weight = 0\.weight",
    ),
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_that_does_not_belong_to_the_numbers_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    text, message = PLANS[kind]
    broken = copied(folder, tmp_path / "m")
    (broken / "plan.toml").write_text(text)
    refused(broken, Mlp(), message)


def test_a_folder_in_place_of_a_file_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path / "m")
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors").mkdir()
    refused(broken, Mlp(), "is corrupt or no safetensors file")
    broken = copied(folder, tmp_path / "n")
    (broken / "plan.toml").unlink()
    (broken / "plan.toml").mkdir()
    refused(broken, Mlp(), "cannot read plan")


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300, "file", "file/below"])
def test_paths_that_hold_no_checkpoint_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError):
        load(tmp_path / name, Mlp())
    with pytest.raises(CheckpointError):
        load_weights(Mlp(), tmp_path / name)


def test_a_model_that_is_not_what_it_was_is_refused(folder: Path) -> None:
    torch.manual_seed(1)
    for other in (Mlp(inputs=17), Mlp(hidden=16), nn.Sequential(*list(Mlp())[:4]), TiedLayers(), Mlp().half()):
        refused(folder, other, f"does not fit {type(other).__name__}: ")


def test_aliases_cannot_tie_what_the_model_does_not_tie(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    save(convert(calibrated(TiedLayers(), "w8a8", [x])), tmp_path / "tied")
    untied = TiedLayers()
    untied.b.weight = nn.Parameter(torch.randn(8, 8))
    refused(tmp_path / "tied", untied, r"\[shared\] b\.weight = a\.weight: these are not one tensor")


def test_random_damage_gives_a_model_or_a_checkpoint_error(folder: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    raw = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    broken, net = copied(folder, tmp_path / "m"), Mlp()
    outcomes = {"model": 0, "error": 0}
    for round_ in range(120):
        damaged = bytearray(raw)
        for _ in range(rng.randint(1, 3)):  # mostly in the header, where the structure is
            damaged[rng.randrange(header if round_ % 4 else len(raw))] = rng.randrange(256)
        (broken / "model.safetensors").write_bytes(bytes(damaged))
        try:
            load(broken, net)
            outcomes["model"] += 1
        except CheckpointError:
            outcomes["error"] += 1
    assert outcomes["error"] > 60
    assert outcomes["model"] > 5
    assert json.loads(raw[8:header])["__metadata__"]["format"] == "bitwright"
