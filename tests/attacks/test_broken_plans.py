"""Plan files written to break the reader: always a `PlanError`, never a crash, a hang or a changed model."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bitwright.errors import BitwrightError, PlanError
from bitwright.flow.prepare import prepare
from bitwright.plan.plan import Plan
from models import Mlp

HEAD = 'version = 1\ntarget = "cpu"\n'
GOOD = Plan.preset("w8a8", Mlp(), torch.zeros(1, 16)).to_toml()

UNREADABLE = {
    "nothing": "",
    "noise": "\x01\x02 = [[[",
    "no version": 'target = "cpu"\n',
    "future version": "version = 2\n",
    "version as text": 'version = "1"\n',
    "version as table": "[version]\na = 1\n",
    "unknown table": HEAD + "[hooks]\nrun = 'rm'\n",
    "array bomb": "a = " + "[" * 100_000,
    "inline table bomb": "a = " + "{b=" * 100_000,
    "nested table bomb": HEAD + "[" + ".".join(["a"] * 3000) + "]\n",
    "sites as list": HEAD + "sites = [1, 2]\n",
    "sites as tables": HEAD + "[[sites]]\na = 1\n",
    "sites nested": HEAD + '[sites.layer]\n"weight" = "int8"\n',
    "spec as number": HEAD + '[sites]\n"0.weight" = 8\n',
    "spec as list": HEAD + '[sites]\n"0.weight" = ["int8"]\n',
    "spec empty": HEAD + '[sites]\n"0.weight" = ""\n',
    "spec of slashes": HEAD + f'[sites]\n"0.weight" = "{"/" * 200}"\n',
    "spec endless": HEAD + f'[sites]\n"0.weight" = "int8/{"channel/" * 100_000}"\n',
    "spec with a huge group": HEAD + f'[sites]\n"0.weight" = "int4/group{"9" * 6000}"\n',
    "spec nested": HEAD + f'[sites]\n"0.weight" = "nf4{"/scale(nf4" * 5000}{")" * 5000}"\n',
    "group of nothing": HEAD + '[sites]\n"0.weight" = "int4/group0"\n',
    "no slot": HEAD + '[sites]\n"0" = "int8"\n',
    "empty name": HEAD + '[sites]\n"" = "int8"\n',
    "pattern of nothing": HEAD + '[sites]\n"[a-" = "int8"\n',
    "pattern bomb": HEAD + f'[sites]\n"{"*a" * 300}.weight" = "int8"\n',
    "target as list": "version = 1\ntarget = ['cpu']\n",
    "target as path": 'version = 1\ntarget = "../targets/cpu"\n',
    "target absolute": 'version = 1\ntarget = "/etc/passwd"\n',
    "observer as number": HEAD + "[observers]\nweight = 1\n",
    "shared with nothing": HEAD + '[sites]\n"0.weight" = "int8"\n[shared]\n"0.weight" = "9.weight"\n',
    "fold of nothing": HEAD + '[folds]\n"0" = "1"\n',
    "why for no slot": HEAD + '[why]\n"0" = "because"\n',
    "twice": HEAD + '[sites]\n"0.weight" = "int8"\n"0.weight" = "int4"\n',
    "date": HEAD + '[sites]\n"0.weight" = 2020-01-01\n',
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_plan_that_cannot_be_read_is_a_plan_error_that_names_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(UNREADABLE[kind], encoding="utf-8")
    start = time.process_time()
    with pytest.raises(PlanError, match=r"cannot read plan .*broken\.toml: ") as caught:
        Plan.load(path)
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 2000
    with pytest.raises(BitwrightError):
        Plan.from_toml(UNREADABLE[kind])


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b'version = 1\n[sites]\n"\xc3\x28.weight" = "int8"', b"\x00" * 4096]
)
def test_bytes_that_are_no_text_are_a_plan_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_bytes(content)
    with pytest.raises(PlanError, match="cannot read plan"):
        Plan.load(tmp_path / "broken.toml")


@pytest.mark.parametrize("name", ["missing.toml", "folder", "folder/../missing.toml", "a\0b", "x" * 300])
def test_paths_that_hold_no_file_are_a_plan_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlanError, match="cannot read plan"):
        Plan.load(tmp_path / name)


MISPLACED = {
    "path tricks": {"../../etc/passwd.weight": "int8/channel"},
    "dunder": {"__class__.weight": "int8/channel"},
    "attribute": {"0.weight.data.weight": "int8/channel"},
    "dots": {"...weight": "int8/channel"},
    "a model without a path": {"weight": "int8/channel"},
    "container": {"0.0.weight": "int8/channel"},
    "activation": {"1.weight": "int8/channel"},
    "activation input": {"1.input": "uint8/asym"},
    "wrong slot": {"0.input.0": "uint8/asym"},
    "add by another name": {"add_x.input.0": "uint8/asym", "add_x.input.1": "uint8/asym"},
    "add in the root": {"add_0.input.0": "uint8/asym", "add_0.input.1": "uint8/asym"},
    "half an add": {"add_0.input.0": "uint8/asym"},
    "add with other digits": {"add_\u0663.input.0": "uint8/asym", "add_\u0663.input.1": "uint8/asym"},
    "add with many digits": {f"add_{'9' * 5000}.input.{n}": "uint8/asym" for n in (0, 1)},
    "add with weight": {"add_0.weight": "int8/channel"},
    "huge name": {"a" * 100_000 + ".weight": "int8/channel"},
    "dynamic weight": {"0.weight": "int8/dynamic"},
    "quantized scales": {"0.weight": "nf4/group16/scale(int8/group7)", "0.input": "float"},
    "large group": {"0.weight": "int4/group999999999", "0.input": "float"},
    "float weight, quantized input": {"0.weight": "float"},
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", MISPLACED)
def test_sites_that_do_not_fit_are_refused_and_change_nothing(kind: str, inplace: bool) -> None:
    lines = dict.fromkeys(["0.weight", "0.input"], "") | {"0.weight": "int8/channel", "0.input": "uint8/asym"}
    text = HEAD + "[sites]\n" + "\n".join(f'"{name}" = "{spec}"' for name, spec in (lines | MISPLACED[kind]).items())
    net = Mlp()
    with pytest.raises(BitwrightError):
        prepare(net, Plan.from_toml(text), inplace=inplace)
    assert [type(module) for module in net.modules()] == [type(module) for module in Mlp().modules()]
    assert not hasattr(net, "bitwright_plan")


@pytest.mark.parametrize(
    "observer", ["", "mse:", "entropy", "ema:2", "ema:nan", "percentile:-1", "mse:1:2", "minmax:9", "os:1"]
)
def test_observers_that_do_not_exist_are_refused_before_anything_runs(observer: str) -> None:
    plan = Plan.from_toml(GOOD.replace('"input" = "mse"', f'"input" = "{observer}"'))
    if observer == "mse:":
        assert isinstance(prepare(Mlp(), plan), nn.Module)  # an argument that is left out is no argument
        return
    with pytest.raises(PlanError, match="observer"):
        prepare(Mlp(), plan)


def test_random_damage_gives_a_plan_or_a_plan_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    path, outcomes = tmp_path / "plan.toml", {"plan": 0, "error": 0}
    for _ in range(400):
        damaged = bytearray(GOOD.encode())
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(damaged))
            if rng.random() < 0.5:
                damaged[place] = rng.randrange(256)
            else:
                del damaged[place : place + rng.randint(1, 20)]
        path.write_bytes(bytes(damaged))
        try:
            plan = Plan.load(path)
        except PlanError:
            outcomes["error"] += 1
            continue
        outcomes["plan"] += 1
        try:
            prepare(Mlp(), plan)
        except BitwrightError:
            outcomes["error"] += 1
    assert min(outcomes.values()) > 20
