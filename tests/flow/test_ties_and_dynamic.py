import pytest
import torch
from safetensors import safe_open
from torch import nn

import bitwright as bw
from bitwright.errors import KernelError, NumericsError


class TiedLm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(ids))))


def test_a_tie_quantized_by_a_rule_is_stored_once(tmp_path):
    torch.manual_seed(0)
    model, ids = TiedLm(), torch.randint(0, 50, (4, 7))
    plan = bw.Plan.preset("w8a8", model, ids, sites={"*.weight": "int8/channel", "head.input": "uint8/asym"})
    simulated = bw.prepare(model, plan)
    bw.calibrate(simulated, [ids])
    shipped = bw.convert(simulated)
    bw.save(shipped, tmp_path / "shipped")
    with safe_open(tmp_path / "shipped" / "model.safetensors", framework="pt") as file:
        tables = [name for name in file.keys() if file.get_tensor(name).shape == (50, 16)]
    assert len(tables) == 1
    assert torch.equal(bw.load(tmp_path / "shipped", model)(ids), simulated.eval()(ids))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch.compile
def test_dynamic_models_compile_without_graph_breaks():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(5, 16)
    plan = bw.Plan.preset("w8a8-dynamic", model, x, sites={"2.weight": "int8/channel", "2.input": "int8/dynamic"})
    simulated = bw.prepare(model, plan)
    bw.calibrate(simulated)
    with torch.no_grad():
        expected = simulated(x)
        assert torch.equal(torch.compile(simulated, fullgraph=True)(x), expected)
        assert torch.equal(torch.compile(bw.convert(simulated), fullgraph=True)(x), expected)


def test_comparing_a_module_that_is_not_there_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4))
    assert bw.compare(model, model, torch.ones(1, 4), ["0"])[0].max_abs == 0
    with pytest.raises(NumericsError, match="5 gave no tensor"):
        bw.compare(model, model, torch.ones(1, 4), ["0", "5"])


def test_a_shipped_linear_layer_refuses_another_width():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)), torch.randn(5, 16)
    simulated = bw.prepare(model, bw.Plan.preset("w8a8", model, x))
    bw.calibrate(simulated, [x])
    with pytest.raises(KernelError, match="takes 16 input features"):
        bw.convert(simulated)(torch.randn(2, 15))
