"""A machine that can choose its data flow takes the best one for each layer, input-stationary included."""

from __future__ import annotations

import numpy as np

from accel_sim.pricing.array import INPUT_STATIONARY, OUTPUT_STATIONARY, WEIGHT_STATIONARY
from accel_sim.pricing.layer import conv_layer, gemm_layer, layer_table
from accel_sim.pricing.machine import machine_record
from accel_sim.pricing.search import price_layers
from accel_sim.spec import DATAFLOWS
from accel_sim.spec_file import load_spec


def test_numbers_and_names_agree() -> None:
    named = {WEIGHT_STATIONARY: "ws", OUTPUT_STATIONARY: "os", INPUT_STATIONARY: "is"}
    assert {number: DATAFLOWS[number] for number in named} == named
    for number, name in named.items():
        prices = price_layers(layer_table([gemm_layer(40, 50, 60).row()]), _machine(name))
        assert prices["dataflow"].tolist() == [number]


def test_the_best_of_all_data_flows_is_taken() -> None:
    """Each one alone is never better than all three, one of them is as good, and each wins somewhere."""
    rng = np.random.default_rng(0)
    layers = [gemm_layer(int(m), int(k), int(n)) for m, k, n in rng.integers(1, 300, (60, 3))]
    layers += [gemm_layer(4, 64, 512), gemm_layer(512, 64, 4), gemm_layer(16, 2000, 16)]
    layers += [conv_layer(48, 20, (9, 9), (3, 3), pads=(1,) * 4), conv_layer(24, 24, (8, 8), (3, 3), groups=24)]
    table = layer_table([layer.row() for layer in layers])
    alone = np.array([price_layers(table, _machine(flow))["cycles"] for flow in ("ws", "os", "is")])
    together = price_layers(table, _machine("ws+os+is"))
    np.testing.assert_array_equal(together["cycles"], alone.min(axis=0))
    assert set(together["dataflow"].tolist()) == {WEIGHT_STATIONARY, OUTPUT_STATIONARY, INPUT_STATIONARY}


def _machine(flows: str) -> np.ndarray:
    return machine_record(load_spec("edge_16x16", {"dataflows": flows}))
