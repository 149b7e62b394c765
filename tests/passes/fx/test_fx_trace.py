"""From modules to networks: the user's module stays as it is, and a failure tells its module and line."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from passes.errors import InputError, UnsupportedError, UsageError, VerificationError
from passes.fx_graph import FxGraph
from passes.manager import PassManager
from passes.registry import PASSES
from tests.contracts.test_graph import svd_chain


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.sum() > 0:
            return y
        return -y


def line_of(function: Any, text: str) -> int:
    lines, start = inspect.getsourcelines(function)
    return start + next(i for i, line in enumerate(lines) if text in line)


def test_control_flow_on_data_is_refused_with_module_line_and_what_to_do() -> None:
    net = nn.Sequential(nn.ReLU(), nn.Sequential(Branches()))
    with pytest.raises(UnsupportedError) as caught:
        FxGraph.trace(net, torch.zeros(1, 3, 5, 5))
    message = str(caught.value)
    line = line_of(Branches.forward, "if y.sum()")
    assert "module '1.0'" in message and f"test_fx_trace.py:{line} (if y.sum() > 0:)" in message
    assert "torch.export.save" in message and "\n" not in message


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return sum(row for row in x)  # type: ignore[return-value]


class AnyNumber(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0]


def test_what_cannot_be_traced_names_itself() -> None:
    with pytest.raises(UnsupportedError, match=r"^Loops cannot be traced at test_fx_trace.py:\d+ .*return sum"):
        FxGraph.trace(Loops(), torch.zeros(2, 3))
    with pytest.raises(UnsupportedError, match=r"AnyNumber takes \*xs"):
        FxGraph.trace(AnyNumber(), torch.zeros(2, 3))


def test_the_users_module_is_never_changed() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 1)).train()
    state = copy.deepcopy(net.state_dict())
    graph = FxGraph.trace(net, torch.ones(2, 3, 6, 6))
    names = ("drop-identities", "fold-batchnorm", "fuse-pointwise", "drop-dead-code")
    assert PassManager([PASSES.load(name)() for name in names]).run(graph).modified
    assert net.training and all(p.requires_grad for p in net.parameters()) and type(net[1]) is nn.BatchNorm2d
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    own = torch.fx.symbolic_trace(copy.deepcopy(net).eval())
    code = own.code
    PassManager([PASSES.load(name)() for name in names]).run(FxGraph.trace(own, torch.ones(2, 3, 6, 6)))
    assert own.code == code and all(torch.equal(state[k], v) for k, v in own.state_dict().items())


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(5, 6)

    def forward(self, a: Tensor, b: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> dict[str, Tensor]:
        y = self.left(a) * scale + self.right(b)
        if mask is not None:
            y = y * mask
        first, second = y.chunk(2, 1)
        return {"first": first, "second": second}


def test_inputs_and_outputs_have_names_and_shapes() -> None:
    net = Several().eval()
    a, b = torch.randn(3, 4), torch.randn(3, 5)
    graph = FxGraph.trace(net, {"b": b, "a": a})
    assert [(s.name, s.dtype, s.shape) for s in graph.inputs] == [("a", "float32", (3, 4)), ("b", "float32", (3, 5))]
    assert [(s.name, s.shape) for s in graph.outputs] == [("first", (3, 3)), ("second", (3, 3))]
    with torch.no_grad():
        expected = net(a, b)
    found = graph.run({"a": a.numpy(), "b": b.numpy()})
    for value, name in zip(found, ("first", "second"), strict=True):
        np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-6, atol=1e-6)
    (split,) = [op for op in graph.workload() if op.op == "Split"]
    assert split.output_shapes == ((3, 3), (3, 3)) and split.outputs == ("chunk:0", "chunk:1")
    renamed = FxGraph.trace(net, [a, b], input_names=["u", "v"], output_names=["p", "q"])
    assert [s.name for s in (*renamed.inputs, *renamed.outputs)] == ["u", "v", "p", "q"]
    renamed.run({"u": a.numpy(), "v": b.numpy()})
    with_mask = FxGraph.trace(net, {"a": a, "b": b, "mask": torch.ones(3, 6)})
    assert [s.name for s in with_mask.inputs] == ["a", "b", "mask"]


def test_examples_that_do_not_fit_are_told() -> None:
    with pytest.raises(InputError, match="no example for input 'b'"):
        FxGraph.trace(Several(), {"a": torch.zeros(3, 4)})
    with pytest.raises(InputError, match="there is no input 'c'"):
        FxGraph.trace(Several(), {"a": torch.zeros(3, 4), "b": torch.zeros(3, 5), "c": torch.zeros(1)})
    with pytest.raises(InputError, match=r"inputs of float32\[3, 4\], float32\[3, 7\]: at 'right'"):
        FxGraph.trace(Several(), [torch.zeros(3, 4), torch.zeros(3, 7)])
    with pytest.raises(UnsupportedError, match="'b' is a list"):
        FxGraph.trace(Several(), [torch.zeros(3, 4), [1.0]])
    with pytest.raises(UsageError, match="1 different output names"):
        FxGraph.trace(nn.Linear(2, 2), torch.zeros(1, 2), output_names=["a", "b"])
    graph = FxGraph.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(InputError, match=r"expected input float32\[1, 2\]"):
        graph.run({"x": np.zeros((1, 2), np.float32)})
    with pytest.raises(InputError, match="cannot be run on these inputs"):
        graph.run({"input": np.zeros((1, 3), np.float32)})


class Counting(nn.Module):
    """Needs values to know its shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[x.sum(1) > 0])


def test_shapes_that_depend_on_values_are_those_of_the_examples() -> None:
    graph = FxGraph.trace(Counting(), torch.tensor([[1.0] * 4, [-1.0] * 4, [2.0] * 4]))
    assert graph.sites().sites[0].input_shape == (2, 4)


def test_a_network_that_was_broken_does_not_pass_the_check() -> None:
    graph = FxGraph.trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 4))
    graph.check()
    graph.module.set_submodule("2", nn.Linear(3, 5))
    with pytest.raises(VerificationError, match=r"'2' gave float32\[1, 2\] and now gives float32\[1, 5\]"):
        graph.check()
    graph.module.set_submodule("2", nn.Linear(7, 5))
    with pytest.raises(VerificationError, match="does not run"):
        graph.check()


def test_a_stale_site_is_not_found() -> None:
    graph = FxGraph.trace(nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 4))
    (site,) = graph.sites().sites
    graph.replace(site, svd_chain(site))
    with pytest.raises(KeyError, match="was it replaced before"):
        graph.replace(site, svd_chain(site))
