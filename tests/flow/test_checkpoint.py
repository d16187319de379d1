"""`save` and `load`: what comes back is what was saved, and no failure leaves half of it."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitwright.errors import BitwrightError, CheckpointError
from bitwright.flow.calibrate import calibrate
from bitwright.flow.checkpoint import load, load_weights, read_tensors, save
from bitwright.flow.convert import convert, is_converted
from bitwright.flow.prepare import plan_of, prepare
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.plan.plan import Plan
from models import EmbeddingNet, Mlp, ResidualCnn, TiedLayers, TiedLm, image, with_statistics
from nets import FEATURES, calibrated, one_thread, trained  # noqa: F401

MODELS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], Tensor]]] = {
    "cnn": (lambda: with_statistics(ResidualCnn()), "w4a4", lambda: image(4)),
    "dynamic": (Mlp, "w8a8-dynamic", lambda: torch.randn(4, 16)),
    "weight only": (Mlp, "w4a16", lambda: torch.randn(4, 16)),
    "embedding": (EmbeddingNet, "w8a8", lambda: torch.randint(20, (2, 6))),
    "tied": (TiedLayers, "w8a8", lambda: torch.randn(4, 8)),
    "half floats": (Mlp, "fp16", lambda: torch.randn(4, 16)),
}


def example(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A trained simulated model, a fresh float model of its class, and an input."""
    make, preset, data = MODELS[kind]
    x = data()
    return trained(calibrated(make(), preset, [x]), [x], steps=4), make(), x


@pytest.mark.parametrize("kind", MODELS)
def test_a_prepared_model_comes_back_bit_for_bit_and_can_be_trained_on(kind: str, tmp_path: Path) -> None:
    simulated, fresh, x = example(kind)
    save(simulated, tmp_path / "work")
    again = load(tmp_path / "work", fresh)
    assert {q.stage for q in again.modules() if isinstance(q, Quantizer)} == {Stage.SIMULATE}
    assert plan_of(again).to_toml() == plan_of(simulated).to_toml()
    with torch.no_grad():
        assert torch.equal(again.eval()(x), simulated(x))
        assert torch.equal(convert(again)(x), convert(simulated)(x))
    before = again(x).detach()
    assert not torch.equal(trained(again, [x], steps=4)(x), before)
    assert not any(isinstance(module, Quantizer) for module in fresh.modules())


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_model_comes_back_bit_for_bit(kind: str, features: str, tmp_path: Path) -> None:
    simulated, fresh, x = example(kind)
    save(convert(simulated), tmp_path / "shipped")
    again = load(tmp_path / "shipped", fresh, features=FEATURES[features])
    assert is_converted(again)
    assert not again.training
    with torch.no_grad():
        if kind == "weight only":  # a float sum, in the order of its instruction set (contract C3)
            assert torch.allclose(again(x), simulated(x), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(again(x), simulated(x))
    save(again, tmp_path / "again")
    one, other = (read_tensors(tmp_path / name / "model.safetensors") for name in ("shipped", "again"))
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())
    assert (tmp_path / "again" / "plan.toml").read_bytes() == (tmp_path / "shipped" / "plan.toml").read_bytes()


def test_a_model_that_was_only_prepared_comes_back_waiting_for_calibration(tmp_path: Path) -> None:
    net, x = Mlp(), torch.randn(4, 16)
    prepared = prepare(net, Plan.preset("w8a8", net, x))
    save(prepared, tmp_path / "work")
    again = load(tmp_path / "work", Mlp())
    assert {q.stage for q in again.modules() if isinstance(q, Quantizer)} == {Stage.FLOAT}
    assert torch.equal(again(x), net(x))
    calibrate(again, [x])


def test_a_root_layer_can_be_saved(tmp_path: Path) -> None:
    net, x = nn.Linear(8, 4), torch.randn(3, 8)
    plan = Plan.preset("w8a8", net, x, sites={"weight": "int4/channel", "input": "uint8/asym"})
    shipped = convert(calibrated(net, plan, [x]))
    save(shipped, tmp_path / "layer")
    assert torch.equal(load(tmp_path / "layer", nn.Linear(8, 4))(x), shipped(x))


def test_tied_weights_are_in_the_file_once(tmp_path: Path) -> None:
    simulated, _, _ = example("tied")
    shipped = convert(simulated)
    for model, name in ((simulated, "weight"), (shipped, "packed")):
        save(model, tmp_path / name)
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            names, aliases = set(file.keys()), json.loads(file.metadata()["aliases"])
        assert f"a.{name}" in names
        assert f"b.{name}" not in names
        assert aliases[f"b.{name}"] == f"a.{name}"
        again = load(tmp_path / name, TiedLayers())
        twins = [getattr(layer, name) for layer in (again.a, again.b)]
        assert twins[0].data_ptr() == twins[1].data_ptr()


def test_tied_weights_that_stay_float_are_in_the_file_once(tmp_path: Path) -> None:
    ids = torch.randint(20, (2, 6))
    plan = Plan.preset("w8a8", TiedLm(), ids, sites={"hidden.weight": "int8/channel"})
    shipped = convert(calibrated(TiedLm(), plan, [ids]))
    save(shipped, tmp_path / "lm")
    with safe_open(tmp_path / "lm" / "model.safetensors", "pt") as file:
        assert {"embedding.weight", "head.weight"} & set(file.keys()) == {"embedding.weight"}
    again = load(tmp_path / "lm", TiedLm())
    assert again.head.weight is again.embedding.weight
    assert torch.equal(again(ids), shipped(ids))


def test_tensors_that_overlap_in_memory_are_saved_whole(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.arange(10.0)
            self.register_buffer("head", memory[:6])
            self.register_buffer("tail", memory[4:])
            self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.inner(x) + self.head + self.tail).relu())

    net, x = Views(), torch.randn(3, 6)
    simulated = calibrated(net, "w8a8", [x])
    save(simulated, tmp_path / "views")
    fresh = Views()
    fresh.head.zero_()
    assert torch.equal(load(tmp_path / "views", fresh)(x), simulated(x))


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None: ...

    net = nn.Sequential(Mlp(), Extra(4, 4))
    simulated = calibrated(
        net, Plan.preset("w8a8", net, torch.zeros(1, 16), sites={"1.*": "float"}), [torch.randn(4, 16)]
    )
    with pytest.raises(CheckpointError, match=r"1\._extra_state is a dict; only tensors can be saved"):
        save(simulated, tmp_path / "extra")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module, Tensor]:
    """Two shipped models of one class, and an input on which they differ."""
    x = torch.randn(4, 16)
    old, new = (convert(calibrated(Mlp(), "w8a8", [x])) for _ in range(2))
    assert not torch.equal(old(x), new(x))
    return old, new, x


def saved(folder: Path, x: Tensor) -> Tensor:
    return load(folder, Mlp())(x).detach()


def test_saving_replaces_an_earlier_checkpoint(pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path) -> None:
    old, new, x = pair
    folder = tmp_path / "deep" / "down" / "model"
    save(old, folder)
    save(new, folder)
    assert torch.equal(saved(folder, x), new(x))
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
    assert sorted(entry.name for entry in folder.iterdir()) == ["model.safetensors", "plan.toml"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_saving_into_an_empty_folder_or_through_a_link_works(
    pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, x = pair
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(old, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(saved(tmp_path / "real", x), old(x))
    monkeypatch.chdir(tmp_path)
    save(new, Path("real"))
    assert torch.equal(saved(tmp_path / "link", x), new(x))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize(
    "others", [["notes.txt"], ["plan.toml"], ["plan.toml", "data.csv"], ["plan.toml", "model.safetensors", ".git"]]
)
def test_a_folder_with_anything_else_in_it_is_never_replaced(
    others: list[str], pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in others:
        (tmp_path / name).write_text("precious")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, Path()):
        with pytest.raises(CheckpointError, match="no bitwright checkpoint; choose another folder"):
            save(pair[0], folder)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == dict.fromkeys(others, "precious")
    assert [entry.name for entry in tmp_path.parent.iterdir() if entry.name.startswith(f".{tmp_path.name}")] == []


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300, "a\0b"])
def test_places_that_cannot_be_written_are_named(
    place: str, pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match=r"cannot write|is no bitwright checkpoint"):
        save(pair[0], tmp_path / place)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


def test_only_prepared_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match="Mlp was not prepared by bitwright"):
        save(Mlp(), tmp_path / "model")


def in_child(action: Callable[[], None]) -> int:
    """Run ``action`` in a forked process; its exit status (negative: the signal that ended it)."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        action()
        status = 0
    finally:
        os._exit(status)


def killed_at(step: int, number: int, action: Callable[[], None]) -> Callable[[], None]:
    """``action``, ended by signal ``number`` just before its ``step``-th call to the system."""

    def run() -> None:
        seen = 0

        def audit(event: str, args: object) -> None:
            nonlocal seen
            if event.startswith(("open", "os.", "shutil.", "tempfile.", "ctypes.")):
                seen += 1
                if seen == step:
                    os.kill(os.getpid(), number)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it as ignored
        sys.addaudithook(audit)
        action()

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="folders are swapped in one step on Linux only")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_signal_at_any_point_leaves_the_old_or_the_new_checkpoint(
    number: signal.Signals, pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path
) -> None:
    old, new, x = pair
    folder, seen = tmp_path / "model", []
    for step in range(1, 200):
        save(old, folder)
        status = in_child(killed_at(step, number, lambda: save(new, folder)))
        out = saved(folder, x)
        seen.append("old" if torch.equal(out, old(x)) else "new" if torch.equal(out, new(x)) else "broken")
        assert all(entry == folder or entry.name.startswith(".model.") for entry in tmp_path.iterdir())
        if status == 0:
            break
        assert status == (-number if number == signal.SIGKILL else 1)
    assert status == 0
    assert len(seen) > 8  # there were that many points to be killed at
    assert seen == sorted(seen, reverse=True)  # old, old, ..., new
    assert (seen[0], seen[-1]) == ("old", "new")


def test_a_first_save_that_is_killed_leaves_nothing_under_its_name(
    pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    for step in range(1, 200):
        status = in_child(killed_at(step, signal.SIGKILL, lambda: save(pair[0], folder)))
        if folder.exists():
            assert torch.equal(saved(folder, pair[2]), pair[0](pair[2]))
            break
    assert folder.exists()
    assert step > 4
    assert status in (0, -signal.SIGKILL)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(
    pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path
) -> None:
    old, new, x = pair
    folder = tmp_path / "model"
    save(old, folder)

    def action() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        with pytest.raises(CheckpointError, match=r"cannot write .*model"):
            save(new, folder)

    assert in_child(action) == 0
    assert torch.equal(saved(folder, x), old(x))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_missing_foreign_or_mismatched_folder_is_explained(
    pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/model\.safetensors does not exist; expected a file written by"):
        load(tmp_path / "nowhere", Mlp())
    (tmp_path / "foreign").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"was not written by this version of bitwright .format 'pt', version None"
    ):
        load(tmp_path / "foreign", Mlp())
    save(pair[0], tmp_path / "model")
    for other in (Mlp(hidden=48), Mlp(classes=7), ResidualCnn()):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"model.* does not fit {type(other).__name__}: "):
            load(tmp_path / "model", other)
        assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    (tmp_path / "model" / "plan.toml").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read plan .*plan\.toml"):
        load(tmp_path / "model", Mlp())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.5])
def test_scales_that_are_none_are_refused_by_name(
    value: float, pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path
) -> None:
    shipped = pair[0]
    name = next(name for name in shipped.state_dict() if name.endswith("weight_scale"))
    with torch.no_grad():
        shipped.state_dict()[name].view(-1)[1] = value
    save(shipped, tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"corrupt: {name} holds {value}, expected positive finite scales"):
        load(tmp_path / "model", Mlp())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_float_weights_load_in_place(suffix: str, tmp_path: Path) -> None:
    source, target = with_statistics(ResidualCnn()), ResidualCnn()
    path = tmp_path / f"weights{suffix}"
    state = {name: value.clone() for name, value in source.state_dict().items()}
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    else:
        save_file(state, path)
    assert load_weights(target, path) is target
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_weights_file_is_executed(tmp_path: Path) -> None:
    torch.save({"0.weight": Touch(tmp_path / "harm")}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Touch(tmp_path / "harm")))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError, match=f"cannot read .*{name} as a state dict of tensors"):
            load_weights(Mlp(), tmp_path / name)
    assert not (tmp_path / "harm").exists()
    pickle.loads((tmp_path / "b.pt").read_bytes())  # the trap itself works
    assert (tmp_path / "harm").exists()


def test_a_checkpoint_holds_text_and_numbers_only(pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path) -> None:
    save(pair[0], tmp_path / "model")
    raw = (tmp_path / "model" / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert set(header.pop("__metadata__")) == {"format", "version", "kind", "aliases"}
    assert {entry["dtype"] for entry in header.values()} <= {"U8", "F32", "I64"}
    assert Plan.load(tmp_path / "model" / "plan.toml").to_toml() == plan_of(pair[0]).to_toml()


@pytest.mark.parametrize("change", ["shape", "missing", "extra", "no tensor", "list", "text"])
def test_float_weights_that_do_not_fit_change_nothing(change: str, tmp_path: Path) -> None:
    net = Mlp()
    state: dict[str, object] = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    if change == "shape":
        state["4.weight"] = torch.zeros(3, 3)
    if change == "missing":
        del state["2.bias"]
    if change == "extra":
        state["6.weight"] = torch.zeros(1)
    if change == "no tensor":
        state["4.bias"] = 3
    torch.save([1, 2] if change == "list" else state, tmp_path / "w.pt")
    if change == "text":
        (tmp_path / "w.pt").write_text("weights")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"w\.pt"):
        load_weights(net, tmp_path / "w.pt")
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
