"""MetaSchedule's traces, from the draw to a network's library. Slow: drawing from its space takes seconds."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from codegen import tvm_build
from codegen.cpu_device import host_device
from codegen.runner.library import Library
from codegen.tune import spaces
from codegen.tune.database import Database
from codegen.tune.metaschedule import MetaScheduleProposer
from codegen.tune.tuner import Stopping, Tuner
from codegen.tune.worker import LocalMeasurer
from codegen.tune.workload import Workload
from tests.onnx_models import normal, onnx_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CONV = Workload.parse("conv 1x8x8x8 -> 8, kernel 3x3, pads 1,1,1,1, float32")
LINEAR = Workload.parse("linear 1x512 -> 40, float32")

BODY = """net (float[1,8,8,8] x) => (float[1,40] y) {
    a = Conv <pads = [1,1,1,1]> (x, u, p)
    b = Relu (a)
    c = Conv <pads = [1,1,1,1]> (b, v, q)
    d = Add (c, x)
    e = Relu (d)
    f = Conv <pads = [1,1,1,1]> (e, u, q)
    g = Flatten (f)
    y = Gemm (g, m, r)
}"""


@pytest.mark.parametrize("evolutionary", [False, True])
def test_a_trace_is_tuned_kept_and_replayed_behind_whatever_follows_the_layer(
    tmp_path: Path, evolutionary: bool
) -> None:
    device = host_device()
    database = Database(tmp_path / "tune.jsonl")
    proposer = MetaScheduleProposer(device, spaces, evolutionary=evolutionary, seed=7)
    try:
        with LocalMeasurer(device) as measurer:
            tuner = Tuner(database, measurer, proposer)
            summary = tuner.tune([CONV, LINEAR], Stopping(4, patience=9, attainable=10.0))
    finally:
        proposer.close()
    # The measuring process compares every output with the reference: none of the traces computes something else.
    assert [(o.trials, o.broken) for o in summary.outcomes] == [(4, 0), (4, 0)], summary
    schedules = {}
    for workload in (CONV, LINEAR):
        first, *traces = Database(database.path).trials(workload, device)
        assert first.schedule == spaces.default(workload, device)
        assert {trial.schedule.template for trial in traces} == {"metaschedule"}
        assert len({trial.schedule for trial in traces}) == 3
        schedules[workload.key] = min(traces, key=lambda trial: trial.seconds or 1.0).schedule
    # Behind the three convolutions stand a clamp, an addition and a clamp, and nothing.
    weights = {"u": normal(8, 8, 3, 3), "v": normal(8, 8, 3, 3, seed=1), "m": normal(512, 40)}
    weights |= {"p": normal(8), "q": normal(8, seed=2), "r": normal(40)}
    path = tmp_path / "net.onnx"
    onnx.save(onnx_model(BODY, weights), path)
    binary = tvm_build.build(path, tmp_path / "net.so", {}, device=device, schedules=schedules)
    assert isinstance(binary, tvm_build.Binary), binary
    assert {used.key: used.tuned for used in binary.workloads} == {CONV.key: True, LINEAR.key: True}
    assert not [note for note in binary.notes if "template" in note], binary.notes
    feed = {"x": normal(1, 8, 8, 8, seed=3)}
    (expected,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)
    found = Library(binary.library).run(feed)["y"]
    # Sums of up to 512 products in float32, in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


def test_the_same_draw_is_drawn_again(tmp_path: Path) -> None:
    drawn = []
    for _ in range(2):
        proposer = MetaScheduleProposer(host_device(), spaces, seed=3)
        try:
            drawn.append(proposer.propose(CONV, [], [], 4))
        finally:
            proposer.close()
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4
