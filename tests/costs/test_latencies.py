"""Tables of latencies: what is timed, their files, kills, and allocations under a limit. No time is tested."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_nets import SPECS, WIDTHS, example, net, plan_of
from torch import nn

import bitwright as bw
from bitwright.costs.cost import plan_bytes
from bitwright.costs.fingerprint import fingerprint, last_level_cache
from bitwright.costs.latencies import LatencyTable, copies_of, measure_machine, table_path
from bitwright.costs.stopwatch import Timing
from bitwright.costs.workload import Specs, Workload, bytes_read
from bitwright.errors import SearchError
from bitwright.graph.calls import Attention
from bitwright.harm.sensitivity import Harm, Sensitivity
from bitwright.lowbit.layer import LowbitLayer
from bitwright.search.speeds import speeds

pytestmark = pytest.mark.filterwarnings(  # tests share a machine, and their models are tiny
    "ignore:this process had the processor", "ignore:the layers with choices take"
)
PROGRAM = Path(__file__).parent / "latency_nets.py"
PATHS = ["blocks.0.0", "blocks.1.0", "out"]
HARM = {"int2/channel": 1.0, "int4/channel": 0.1, "int8/channel": 0.0}
POSITIVE = st.floats(1e-12, 1e6)


def timed(cache: Path, specs: Mapping[str, Sequence[str]] = SPECS) -> tuple[LatencyTable, list[str]]:
    """The table, and the keys that this call measured."""
    keys: list[str] = []
    model = net()
    rows: list[tuple[int, int]] = []

    def told(key: str, row: Timing, done: int, total: int) -> None:
        keys.append(key)
        rows.append((done, total))

    table = measure_machine(model, plan_of(model), example(), specs, cache=cache, seconds=0.0, on_row=told)
    assert rows == [(total - len(rows) + at, total) for at, (_, total) in enumerate(rows, 1)]
    return table, keys


def sensitivity(sites: Sequence[str]) -> Sensitivity:
    rows = [Harm(site, spec, harm, 0.0) for site in sites for spec, harm in HARM.items()]
    return Sensitivity("kl", "nats", "", "", 2, tuple(rows))


def synthetic(seconds: Mapping[str, float], whole: float = 1.0) -> LatencyTable:
    """A table in which a call takes what its weight's spec says."""
    model = net()
    work = Workload(model, plan_of(model), example(), PATHS)
    rows = {work.whole: Timing(whole, 0.0, 1)}
    for path in PATHS:
        for spec, taken in seconds.items():
            specs = {**work.decided(path), "weight": bw.QuantSpec.parse(spec)}
            rows |= {work.key(path, specs, made): Timing(taken, 0.0, 1) for made in work.calls[path]}
    return LatencyTable(rows)


def test_equal_calls_are_timed_once_for_each_choice(tmp_path: Path) -> None:
    table, keys = timed(tmp_path)
    assert list(table.rows) == keys
    assert len(set(keys)) == len(keys)
    assert keys[0].startswith("whole Net ")
    convolutions = [key for key in keys if key.startswith("Conv2d")]
    assert len(convolutions) == 4  # both have one key per choice, and the float form
    assert sum("weight=float, input=float" in key for key in keys) == 2
    assert all("BatchNorm2d" in key and "kernel_size=(3, 3)" in key for key in convolutions)
    assert all("float32[1, 4, 6, 6]" in key for key in convolutions)
    assert all(row.seconds > 0 and row.count == 5 for row in table.rows.values())


def test_strides_of_the_input_are_those_of_the_shipped_model() -> None:
    model = net()
    work = Workload(model, plan_of(model), example(), PATHS)
    [made] = work.calls["blocks.0.0"]
    assert made.args[0].is_contiguous(memory_format=torch.channels_last)
    assert "strides (144, 1, 24, 4)" in work.key("blocks.0.0", work.decided("blocks.0.0"), made)


def test_a_layer_alone_is_the_layer_that_ships() -> None:
    model = net()
    plan = plan_of(model)
    work = Workload(model, plan, example(), ["stem", "blocks.0.0"])
    [made] = work.calls["stem"]
    alone = work.alone("stem", work.decided("stem"), made)
    assert torch.equal(alone(*made.args), work.shipped.get_submodule("stem")(*made.args))
    [made] = work.calls["blocks.0.0"]
    folded = work.alone("blocks.0.0", work.decided("blocks.0.0"), made)
    assert folded.layer.extra_repr() == work.shipped.get_submodule("blocks.0.0").extra_repr()
    assert isinstance(folded.norm, nn.Identity)
    plain = work.alone("blocks.0.0", dict.fromkeys(work.decided("blocks.0.0")), made)
    torch.testing.assert_close(plain(*made.args), model.blocks[0](*made.args))


class Everything(nn.Module):
    """Every kind of module that has choices."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag = nn.Embedding(20, 8), nn.EmbeddingBag(20, 8)
        self.lstm, self.gru = nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.heads, self.attention = nn.MultiheadAttention(8, 2, batch_first=True), Attention()
        self.up, self.line = nn.ConvTranspose1d(8, 8, 2, 2), nn.Conv1d(8, 8, 3)
        self.deep, self.out = nn.Conv3d(1, 2, 2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.gru(self.lstm(self.words(x))[0])[0]
        y = self.heads(y, y, y)[0]
        y = self.attention(y, y, y, is_causal=True) + self.bag(x).unsqueeze(1)
        y = self.line(self.up(y.transpose(1, 2))).transpose(1, 2)
        z = self.deep(y.unflatten(2, (2, 4)).unsqueeze(1))
        return self.out(y.mean(1)) + z.mean()


def test_every_kind_of_layer_can_be_timed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, words = Everything().eval(), torch.randint(0, 20, (2, 6))
    rules = {"attention.*": "uint8/asym", "heads.attention_0.*": "uint8/asym"}
    plan = bw.Plan.preset("w8a8", model, words, sites=rules, observers={"weight": "minmax", "input": "minmax"})
    specs = {str(site): ["int8/channel"] for site in plan.sites if site.is_weight and site.path not in ("up", "out")}
    specs |= {"up.weight": ["int4/channel"], "attention.*": ["uint8/asym"], "heads.attention_0.*": ["uint8/asym"]}
    table = measure_machine(model, plan, words, specs, cache=tmp_path, seconds=0.0)
    classes = {key.partition("(")[0] for key in table.rows}
    expected = {"Embedding", "EmbeddingBag", "LSTM", "GRU", "MultiheadAttention", "Attention", "ConvTranspose1d"}
    assert expected | {"Conv1d", "Conv3d"} <= classes
    layers = speeds(table, model, plan, words, specs)
    assert all(choice.cost.latency > 0 for layer in layers for choice in layer.choices)


class Waiting(nn.Linear):
    """Stands for a layer during which other programs run."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return super().forward(input)


def test_a_busy_machine_is_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Waiting(4, 4), nn.Linear(4, 2)).eval()
    plan = bw.Plan.preset("w8a8", model, torch.zeros(1, 4), sites={"1.*": None})
    with pytest.warns(UserWarning, match=r"had the processor for \d+ % of the time.*delete .*latency-.*json"):
        measure_machine(model, plan, torch.zeros(1, 4), {"0.weight": WIDTHS}, cache=tmp_path, seconds=0.0)


@settings(max_examples=25)  # each one waits for the disk
@given(
    st.dictionaries(st.text(max_size=20), st.tuples(POSITIVE, st.floats(0.0, 1e6), st.integers(1, 10**9)), max_size=8)
)
def test_a_file_gives_back_what_was_written(rows: dict[str, tuple[float, float, int]]) -> None:
    from tempfile import TemporaryDirectory

    table = LatencyTable({key: Timing(*row) for key, row in rows.items()})
    with TemporaryDirectory() as folder:
        table.save(Path(folder) / "deep" / "table.json")
        assert LatencyTable.load(Path(folder) / "deep" / "table.json") == table


@pytest.mark.parametrize("name", sorted(fingerprint()))
def test_a_table_of_another_machine_is_refused(name: str, tmp_path: Path) -> None:
    table = LatencyTable({"a": Timing(1.0, 0.0, 1)})
    replace(table, machine={**table.machine, name: "another"}).save(tmp_path / "table.json")
    with pytest.raises(
        SearchError, match=rf"table\.json was measured with {name} another; here it is .*measure-machine"
    ):
        LatencyTable.load(tmp_path / "table.json")


def test_threads_have_tables_of_their_own(tmp_path: Path) -> None:
    one, before = table_path(tmp_path), torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert table_path(tmp_path) != one
    finally:
        torch.set_num_threads(before)
    assert table_path(tmp_path) == one


GOOD = {"version": 1, "machine": fingerprint(), "rows": {"a": {"seconds": 1.0, "error": 0.0, "count": 1}}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        json.dumps({**GOOD, "version": 2}),
        json.dumps({**GOOD, "rows": {"a": {"seconds": 1.0}}}),
        json.dumps({**GOOD, "rows": {"a": {"seconds": float("nan"), "error": 0.0, "count": 1}}}),
        json.dumps({**GOOD, "rows": {"a": {"seconds": 0.0, "error": 0.0, "count": 1}}}),
        json.dumps({**GOOD, "rows": []}),
        json.dumps({"version": 1, "rows": {}}),
    ],
)
def test_a_damaged_table_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    path = table_path(tmp_path)
    path.write_text(text)
    with pytest.raises(SearchError, match=r"cannot read latency table .*delete the file to measure anew"):
        timed(tmp_path)
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SearchError, match=r"cannot write the latency table .*another cache folder"):
        LatencyTable().save(tmp_path / "file" / "table.json")


def test_rows_are_not_timed_again(tmp_path: Path) -> None:
    first, keys = timed(tmp_path, {"out.weight": WIDTHS[:2]})
    table_path(tmp_path).with_suffix(".json.part").write_text("half a file")  # what a kill may leave
    again, none = timed(tmp_path, {"out.weight": WIDTHS[:2]})
    assert (again, none) == (first, [])
    more, new = timed(tmp_path, {"out.weight": [*WIDTHS, "int3/channel"]})
    assert len(new) == 1  # int8 was timed as what the plan decides
    assert {key: more.rows[key] for key in keys} == first.rows


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_measurement_goes_on(after: int, tmp_path: Path) -> None:
    def run(kill_after: int | None) -> list[str]:
        lines = []
        command = [sys.executable, str(PROGRAM), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if len(lines) == kill_after:
                    process.kill()
                    break
            rest = process.stdout.read().splitlines()
        assert process.returncode == (0 if kill_after is None else -signal.SIGKILL)
        return lines + rest

    before = run(after)
    held = LatencyTable.load(table_path(tmp_path))
    assert set(before) <= set(held.rows)
    rest = run(None)
    whole = LatencyTable.load(table_path(tmp_path))
    assert list(whole.rows) == [*held.rows, *rest]
    assert {key: whole.rows[key] for key in held.rows} == held.rows
    assert timed(tmp_path)[1] == []


def test_the_usual_folder_is_that_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table_path().parent == tmp_path / "bitwright"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert table_path().parent == tmp_path / ".cache" / "bitwright"
    assert table_path("here").parent == Path("here")


def test_a_limit_on_latency_is_kept_and_predictions_add_up() -> None:
    model = net()
    plan, table = plan_of(model), synthetic({"int2/channel": 0.01, "int4/channel": 0.02, "int8/channel": 0.05})
    made = bw.mixture(model, plan, example(), sensitivity([f"{path}.weight" for path in PATHS]), latency=table)
    best = made.allocate(bw.Budget())
    assert set(best.sites.values()) == {"int8/channel"}
    assert best.cost.latency == pytest.approx(1.0)  # the plan itself: the whole model as it was measured
    assert made.fixed.latency == pytest.approx(1.0 - 3 * 0.05)
    found = made.allocate(bw.Budget(latency=1.0 - 0.05))
    assert sorted(found.sites.values()) == ["int4/channel", "int4/channel", "int8/channel"]
    assert found.cost.latency == pytest.approx(1.0 - 0.06)
    fastest = made.allocate(bw.Budget(), minimize="latency")
    assert set(fastest.sites.values()) == {"int2/channel"}
    with pytest.raises(SearchError, match=r"the smallest that any choice reaches is latency 0\.88"):
        made.allocate(bw.Budget(latency=0.8))
    assert bw.with_allocation(plan, found).sites[bw.Site("out", "weight")] is not None


def test_layers_that_take_more_than_the_model_are_told() -> None:
    model, table = net(), synthetic({"int2/channel": 0.01, "int4/channel": 0.02, "int8/channel": 0.05}, whole=0.1)
    harm = sensitivity([f"{path}.weight" for path in PATHS])
    with pytest.warns(UserWarning, match="take 150 ms one by one, the whole model 100 ms: in bitwright .*time the"):
        made = bw.mixture(model, plan_of(model), example(), harm, latency=table)
    assert made.of(plan_of(model)).cost.latency == pytest.approx(0.1)  # the plan that was measured


def test_a_width_without_a_winning_kernel_is_named_and_taken_for_its_bytes_only() -> None:
    model = net()
    table = synthetic({"int2/channel": 0.06, "int4/channel": 0.02, "int8/channel": 0.05})
    made = bw.mixture(
        model, plan_of(model), example(), sensitivity([f"{path}.weight" for path in PATHS]), latency=table
    )
    assert {row.specs for row in made.slower()} == {("int2/channel",)}
    assert {row.than for row in made.slower()} == {("int4/channel",)}
    assert set(made.allocate(bw.Budget(latency=0.95)).sites.values()) <= {"int4/channel", "int8/channel"}
    smallest = made.allocate(bw.Budget(), minimize="bytes")
    assert set(smallest.sites.values()) == {"int2/channel"}


def test_what_was_not_measured_is_named_with_the_way_out() -> None:
    model, other = net(), torch.randn(2, 3, 6, 6)
    plan, table = plan_of(model), synthetic({"int2/channel": 0.01, "int8/channel": 0.05})
    advice = "call measure_machine .*with this plan, example and these specs"
    with pytest.raises(SearchError, match=rf"out with weight int4/channel, .* was not measured; {advice}"):
        bw.mixture(model, plan, example(), sensitivity(["out.weight"]), latency=table)
    with pytest.raises(SearchError, match=rf"out with .* on float32\[2, 4\].* was not measured; {advice}"):
        bw.mixture(model, plan, other, sensitivity(["out.weight"]), latency=table)
    parts = {key: row for key, row in synthetic(HARM).rows.items() if not key.startswith("whole")}
    with pytest.raises(SearchError, match=f"the whole model was not measured.*{advice}"):
        bw.mixture(model, plan, example(), sensitivity(["out.weight"]), latency=LatencyTable(parts))
    unnamed = plan.with_sites({"*add_0.*": None})
    with pytest.raises(SearchError, match=r"add_0 is no module of the shipped model: give its sites a spec"):
        measure_machine(model, unnamed, example(), {"*add_0.*": ["uint8/asym"]}, cache="unused")


def test_a_limit_without_a_table_stays_an_error() -> None:
    model = net()
    made = bw.mixture(model, plan_of(model), example(), sensitivity(["out.weight"]))
    assert made.slower() == []
    with pytest.raises(SearchError, match="latency is limited or minimized, but no choice has one"):
        made.allocate(bw.Budget(latency=1.0))


def test_float_is_a_choice(tmp_path: Path) -> None:
    model = net()
    plan, specs = plan_of(model), {"out.weight": ["int8/channel", "float"], "out.input": ["uint8/asym", "float"]}
    table = measure_machine(model, plan, example(), specs, cache=tmp_path, seconds=0.0)
    [layer] = speeds(table, model, plan, example(), specs)
    assert {choice.specs for choice in layer.choices} == {
        ("int8/channel", "uint8/asym"),
        ("int8/channel", "float"),
        ("float", "float"),
    }
    rows = [Harm(site, spec, float(spec != "float"), 0.0) for site, texts in specs.items() for spec in texts]
    made = bw.mixture(model, plan, example(), Sensitivity("kl", "nats", "", "", 2, tuple(rows)), latency=table)
    found = made.allocate(bw.Budget())
    assert set(found.sites.values()) == {"float"}
    assert bw.with_allocation(plan, found).sites[bw.Site("out", "weight")] is None


def test_a_float_layer_keeps_its_batch_norm_and_its_bytes_are_counted() -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 4)]
    model, weight, input = nn.Sequential(*layers).eval(), "1.weight", "1.input"
    plan = bw.Plan.preset("w8a8", model, example())
    assert plan.folds == {"1": "2"}
    texts = {weight: ("int4/channel", "float"), input: ("uint8/asym", "float")}
    for best in ("int4/channel", "float"):
        rows = [Harm(s, text, float(s == weight and text != best), 0.0) for s in texts for text in texts[s]]
        made = bw.mixture(model, plan, example(), Sensitivity("kl", "nats", "", "", 2, tuple(rows)))
        found = made.allocate(bw.Budget())
        assert found.sites[weight] == best
        assert found.cost.bytes == plan_bytes(model, bw.with_allocation(plan, found))


def test_the_bytes_between_two_calls_are_part_of_the_key() -> None:
    model = net()
    work = Workload(model, plan_of(model), example(), ["out"])
    assert 512 <= work.among <= 4096
    assert work.among & (work.among - 1) == 0
    [made] = work.calls["out"]
    specs: Specs = work.decided("out")
    before = work.key("out", specs, made)
    work.among *= 2
    assert work.key("out", specs, made) != before


def test_copies_hold_as_many_bytes_as_pass_between_two_calls() -> None:
    model = net()
    work = Workload(model, plan_of(model), example(), ["out"])
    [made] = work.calls["out"]
    choices = [work.decided("out"), dict.fromkeys(work.decided("out"))]
    own = sum(bytes_read(work.alone("out", specs, made)) for specs in choices)
    for among, count in ((own // 2, 1), (own, 1), (own * 10 - 1, 10), (own * 10**6, 64)):
        work.among = among
        candidates = copies_of(work, "out", choices, made)
        assert [len(copies) for copies in candidates] == [count, count]
        constants = {tensor.data_ptr() for copies in candidates for run in copies for tensor in tensors(run)}
        assert len(constants) == count * sum(len(list(tensors(copies[0]))) for copies in candidates)


def tensors(run: Callable[[], object]) -> Iterator[torch.Tensor]:
    """Weights that a timed call reads."""
    layer = run.func.__self__.layer  # type: ignore[attr-defined]
    yield layer.constants.layout if isinstance(layer, LowbitLayer) else layer.weight


def test_the_largest_cache_is_read_where_the_system_says(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path / "none") == 32 << 20
    for at, size in enumerate(("32K", "1024K", "36608K")):
        (tmp_path / f"index{at}").mkdir()
        (tmp_path / f"index{at}" / "size").write_text(size + "\n")
    assert last_level_cache(tmp_path) == 36608 << 10
