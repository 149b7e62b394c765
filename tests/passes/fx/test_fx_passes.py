"""The passes on torch networks, through the harness that every pass goes through."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.core.reference import relative_l2
from passes.drop_dead_code import DropDeadCode
from passes.drop_identities import DropIdentities
from passes.factorize import Factorize
from passes.fold_batchnorm import FoldBatchNorm
from passes.fuse_pointwise import FusePointwise
from passes.fx_graph import FxGraph
from tests.contracts.test_graph import svd_chain
from tests.pass_harness import check_pass

TOLERANCE = 2e-6


def traced(module: nn.Module, *shape: int) -> FxGraph:
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_var is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return FxGraph.trace(module, torch.zeros(shape))


class Function(nn.Module):
    """A function of x and this module, which holds a conv, a BatchNorm, two linear layers and constants."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        self.gain, self.scalar = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.tensor(0.3))
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(self, x)  # type: ignore[operator]
        return result


AFFINES = {
    "module": (lambda s, x: s.bn(s.conv(x)), {"Conv": 1, "BatchNormalization": 1}),
    "function": (
        lambda s, x: F.batch_norm(s.conv(x), s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias, eps=0.1),
        {"Conv": 1, "BatchNormalization": 1},
    ),
    "torch": (
        lambda s, x: torch.batch_norm(
            s.conv(x), s.bn.weight, s.bn.bias, s.bn.running_mean, s.bn.running_var, False, 0.1, 1e-3, False
        ),
        {"Conv": 1, "BatchNormalization": 1},
    ),
    "no gain": (
        lambda s, x: F.batch_norm(s.conv(x), s.bn.running_mean, s.bn.running_var),
        {"Conv": 1, "BatchNormalization": 1},
    ),
    "mul": (lambda s, x: s.gain * s.conv(x), {"Conv": 1, "Mul": 1}),
    "in place": (lambda s, x: s.conv(x).mul_(s.gain).add_(0.5), {"Conv": 1, "Mul": 1, "Add": 1}),
    "scalars": (lambda s, x: (1 - s.conv(x)) / s.scalar, {"Conv": 1, "Sub": 1, "Div": 1}),
    "named in another order": (lambda s, x: torch.sub(other=s.gain, input=s.conv(x)), {"Conv": 1, "Sub": 1}),
    "linear": (lambda s, x: s.fc(x[:, 0, 0]) * s.gain.view(4), {"Slice": 1, "Gemm": 1, "Mul": 1}),
}


@pytest.mark.parametrize("name", AFFINES)
def test_affines_are_folded(name: str) -> None:
    function, before = AFFINES[name]
    graph = traced(Function(function), 2, 3, 5, 5)
    after = {op: count for op, count in before.items() if op in ("Conv", "Gemm", "Slice")}
    check_pass(FoldBatchNorm(), graph, graph.random_feeds(0), before=before, after=after, tolerance=TOLERANCE)
    assert {s.name for s in graph.sites().sites} <= {"conv", "fc"}


NO_AFFINES = {
    "two readers": lambda s, x: s.bn(y := s.conv(x)) + y.mean(),
    "statistics of the batch": lambda s, x: F.batch_norm(s.conv(x), None, None, training=True),
    "by position": lambda s, x: s.conv(x) * x[:, :1, 1:4, 1:4],
    "division by it": lambda s, x: s.scalar / s.conv(x),
    "with alpha": lambda s, x: torch.add(s.conv(x), s.gain, alpha=2),
    "the result of both": lambda s, x: (y := s.conv(x)) * y,
    "along another axis": lambda s, x: s.fc(x) * s.gain[:3],
}


@pytest.mark.parametrize("name", NO_AFFINES)
def test_what_is_no_affine_of_one_layer_stays(name: str) -> None:
    graph = traced(Function(NO_AFFINES[name]), 2, 3, 5, 5)
    assert len(graph.sites().sites) == 1 and graph.affines() == ()


def test_an_exported_network_that_was_decomposed_is_folded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    net = Function(lambda s, x: s.bn(s.conv(x))).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(2, 3, 5, 5),)).run_decompositions(), buffer)
    path = tmp_path / "net.pt2"
    path.write_bytes(buffer.getvalue())
    graph = FxGraph.read(path)
    before = {"Conv": 1, "BatchNormalization": 1}
    check_pass(FoldBatchNorm(), graph, graph.random_feeds(0), before=before, after={"Conv": 1}, tolerance=TOLERANCE)


IDENTITIES = {
    "modules": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.Dropout2d(), nn.ReLU()),
        {"Identity": 1, "Dropout": 1},
    ),
    "dropout": (Function(lambda s, x: F.relu(F.dropout(s.conv(x), 0.5, s.training))), {"Dropout": 1}),
    "casts": (Function(lambda s, x: F.relu(s.conv(x).float().to(torch.float32))), {"Cast": 2}),
    "copies": (Function(lambda s, x: F.relu(s.conv(x).clone().detach())), {"Identity": 2}),
    "at the output": (Function(lambda s, x: F.dropout(F.relu(s.conv(x)), training=False)), {"Dropout": 1}),
    "axes in place": (
        Function(lambda s, x: F.relu(torch.cat([s.conv(x).permute(0, 1, 2, 3)]))),
        {"Transpose": 1, "Concat": 1},
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_are_dropped(name: str) -> None:
    module, gone = IDENTITIES[name]
    graph = traced(module, 2, 3, 5, 5)
    kept = {"Conv": 1, "Relu": 1}
    check_pass(DropIdentities(), graph, graph.random_feeds(0), before=kept | gone, after=kept, tolerance=0.0)


KEPT = {
    "training dropout": lambda s, x: F.relu(F.dropout(s.conv(x), 0.5, True)),
    "default dropout": lambda s, x: F.relu(F.dropout(s.conv(x))),
    "a real cast": lambda s, x: s.conv(x).to(torch.float64),
    "a copy that shields": lambda s, x: (y := s.conv(x)).clone().relu_() + y,
    "a cast that shields": lambda s, x: (y := s.conv(x)).to(torch.float32, copy=True).relu_() + y,
    "input to output": lambda s, x: (x.detach(), s.conv(x)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_may_not_go_is_kept(name: str) -> None:
    graph = traced(Function(KEPT[name]), 2, 3, 5, 5)
    assert graph.drop_identities() == ()


def test_dead_code_goes_with_its_constants() -> None:
    def function(s: Function, x: Tensor) -> Tensor:
        torch.exp(s.bn(x[:, :1] * s.gain))
        return s.conv(x)

    graph = traced(Function(function), 2, 3, 5, 5)
    before = {"Slice": 1, "Mul": 1, "BatchNormalization": 1, "Exp": 1, "Conv": 1}
    result = check_pass(DropDeadCode(), graph, graph.random_feeds(0), before=before, after={"Conv": 1}, tolerance=0.0)
    names = {note.node for note in result.notes}
    assert {"exp", "bn", "gain", "bn.running_var"} <= names and "conv.weight" not in names
    assert [name for name, _ in graph.module.named_parameters()] == ["conv.weight"]


EFFECTS = {
    "in place": lambda s, x: (y := s.conv(x), y.add_(1))[0],
    "function in place": lambda s, x: (y := s.conv(x), F.relu(y, inplace=True))[0],
    "by position": lambda s, x: (y := s.conv(x), F.leaky_relu(y, 0.2, True))[0],
    "item": lambda s, x: (y := s.conv(x), y.__setitem__((slice(None), 0), 0.0))[0],
    "state": lambda s, x: (s.state.add_(1), s.conv(x) + s.state.view(4, 1, 1))[1],
}


@pytest.mark.parametrize("name", EFFECTS)
def test_what_changes_something_else_is_no_dead_code(name: str) -> None:
    graph = traced(Function(EFFECTS[name]), 2, 3, 5, 5)
    feeds = graph.random_feeds(0)
    reference = graph.clone().run(feeds)[0]
    notes = graph.drop_dead_code()
    assert notes == ()
    if name != "state":  # runs of that one differ by what they are to keep
        np.testing.assert_array_equal(graph.run(feeds)[0], reference)


def test_layers_with_nothing_between_them_are_fused() -> None:
    graph = traced(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 3), nn.ReLU()), 2, 3, 5, 5)
    before, after = {"Conv": 2, "Relu": 1}, {"Conv": 1, "Relu": 1}
    check_pass(FusePointwise(), graph, graph.random_feeds(0), before=before, after=after, tolerance=TOLERANCE)
    assert [s.name for s in graph.sites().sites] == ["0+1"]
    linear = traced(Function(lambda s, x: s.second(s.fc(x))), 2, 3, 5, 5)
    check_pass(
        FusePointwise(), linear, linear.random_feeds(0), before={"MatMul": 2}, after={"MatMul": 1}, tolerance=TOLERANCE
    )


def test_a_layer_that_is_read_in_between_is_not_fused() -> None:
    graph = traced(Function(lambda s, x: s.second(y := s.fc(x)).sum() + y), 2, 3, 5, 5)
    assert graph.adjacent() == ()


def test_chains_go_in_and_stay_where_they_are() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(36, 5)
    )
    graph = traced(net, 2, 3, 5, 5)
    chains = {site.name: svd_chain(site) for site in graph.sites().sites}
    before = {"Conv": 2, "Relu": 1, "Flatten": 1, "Gemm": 1}
    after = {"Conv": 4, "Relu": 1, "Flatten": 1, "Gemm": 2}
    feeds = graph.random_feeds(0)
    check_pass(Factorize(chains), graph, feeds, before=before, after=after, tolerance=TOLERANCE)
    # and the module that comes out of it is one that torch can trace again
    other = torch.fx.symbolic_trace(graph.module)
    (x,) = feeds.values()
    with torch.no_grad():
        assert relative_l2(other(torch.from_numpy(x)).numpy(), graph.run(feeds)[0]) < TOLERANCE
    assert sorted(name for name in other.state_dict() if name.startswith("0.")) == [
        "0.rotated_0.weight",
        "0.rotated_1.bias",
        "0.rotated_1.weight",
    ]
