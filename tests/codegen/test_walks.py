from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from codegen.walks import outputs_under, outputs_under_each
from passes.core.site import Chain
from passes.onnx_graph import OnnxGraph
from passes.onnx_stepper import Feeds, Stepper
from tests.onnx_models import normal

DIGITS = Path(__file__).parents[2] / "examples" / "digits.onnx"


@pytest.mark.parametrize("apart", [False, True])
def test_outputs_under_one_chain_at_a_time(apart: bool) -> None:
    graph = OnnxGraph.read(DIGITS)
    stepper = Stepper(graph.model(), graph.sites().sites)
    x = normal(4, 1, 16, 16, seed=1)
    feeds: Feeds = [{"image": x[:2]}, {"image": x[2:]}] if apart else {"image": x}
    some = list(stepper.sites.values())[1:6:2]
    chains = {s.name: Chain((replace(s.stage, weight=s.stage.weight * 2),)) for s in some}
    found: dict[str, torch.Tensor] = {}

    def seen(name: str, outputs: dict[str, torch.Tensor]) -> None:
        found[name] = outputs["logits"]

    outputs_under_each(stepper, feeds, {name: partial(chains.__getitem__, name) for name in chains}, seen)
    unchanged = outputs_under(stepper, feeds, {})["logits"]
    assert found.keys() == chains.keys() and len(found) == 3
    for name, chain in chains.items():
        assert torch.equal(found[name], outputs_under(stepper, feeds, {name: chain})["logits"])
        assert not torch.equal(found[name], unchanged)
