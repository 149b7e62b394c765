"""Networks that our own call of the static quantizer writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from codegen.dataset import random_inputs
from codegen.quantized.frontend import read_qdq
from codegen.quantized.graph import QConv
from codegen.quantized.quantize import Calibration, quantize
from codegen.quantized.reference import dequantized_outputs, quantized_inputs, run_quantized
from passes.errors import InputError, UnsupportedError
from passes.graph import TensorSpec
from tests.codegen.quantized.qdq_models import kinds, ort
from tests.onnx_models import batchnorm_weights, normal, onnx_model

CHAIN = """
network (float[N,3,12,12] image) => (float[N,5] logits) {
    a = Conv <kernel_shape = [3,1], pads = [1,0,1,0]> (image, u, ub)
    b = Conv <kernel_shape = [1,3], pads = [0,1,0,1]> (a, v, vb)
    c = BatchNormalization (b, gamma, beta, mean, var)
    d = Relu (c)
    e = GlobalAveragePool (d)
    f = Flatten (e)
    logits = Gemm <transB = 1> (f, w, wb)
}
"""


def network(opset: int) -> onnx.ModelProto:
    """A low-rank pair of convolutions with nothing between, as the compiler writes them, and a batch norm."""
    weights = {
        "u": normal(4, 3, 3, 1), "ub": normal(4), "v": normal(8, 4, 1, 3), "vb": normal(8),
        "w": normal(5, 8), "wb": normal(5), **batchnorm_weights(8),
    }  # fmt: skip
    return onnx_model(CHAIN, weights, opset)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    onnx.save(network(17), tmp_path / "chain.onnx")
    return tmp_path / "chain.onnx"


FEEDS = [{"image": normal(4, 3, 12, 12, seed=seed)} for seed in range(5)]


@pytest.mark.parametrize("method", list(Calibration))
@pytest.mark.parametrize("signed", [True, False])
def test_a_chain_is_quantized_and_stays_near_its_floats(chain: Path, method: Calibration, signed: bool) -> None:
    seen: list[int] = []
    out = chain.with_name("int8.onnx")
    made = quantize(chain, out, FEEDS, method=method, signed=signed, progress=seen.append)
    assert (made.samples, made.calibrated, made.method, seen) == (20, True, method, [4, 8, 12, 16, 20])
    before, after = onnx.load(chain), onnx.load(out)
    assert after.graph.input == before.graph.input
    assert [o.name for o in after.graph.output] == ["logits"]
    assert after.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "N"
    graph = read_qdq(out)
    assert kinds(graph) == ["QConv", "QConv", "QPool", "QReshape", "QConv"]
    assert {t.signed for t in graph.tensors.values()} == {signed}
    assert [o.multipliers.size for o in graph.operations if isinstance(o, QConv)] == [4, 8, 5]
    feeds = FEEDS[0]
    found = dequantized_outputs(graph, run_quantized(graph, quantized_inputs(graph, feeds)))["logits"]
    floats = ort(before, feeds)["logits"]
    assert np.linalg.norm(found - floats) < 0.1 * np.linalg.norm(floats)
    assert np.array_equal(found, ort(after, feeds)["logits"])


def test_the_same_call_gives_the_same_file(chain: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        quantize(chain, chain.with_name(name), FEEDS)
    assert chain.with_name("one.onnx").read_bytes() == chain.with_name("two.onnx").read_bytes()


def test_batches_of_a_dataset_are_its_samples(chain: Path) -> None:
    data = random_inputs([TensorSpec("image", "float32", ("N", 3, 12, 12))], {}, 10, seed=1)
    made = quantize(chain, chain.with_name("int8.onnx"), data, batch=4, method="minmax")
    assert (made.samples, made.source) == (10, "random inputs, seed 1")


def test_without_data_the_result_says_so(chain: Path) -> None:
    made = quantize(chain, chain.with_name("int8.onnx"), random_count=3)
    assert (made.calibrated, made.samples, made.source) == (False, 3, "random inputs, seed 0")


def test_an_old_operator_set_is_converted(chain: Path) -> None:
    old = chain.with_name("old.onnx")
    onnx.save(network(9), old)
    out = chain.with_name("int8.onnx")
    quantize(old, out, FEEDS)
    assert next(o.version for o in onnx.load(out).opset_import if not o.domain) >= 13
    assert kinds(read_qdq(out)).count("QConv") == 3


def test_what_cannot_be_used_is_refused(chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    with pytest.raises(InputError, match="no samples"):
        quantize(chain, out, [])
    with pytest.raises(InputError, match="no data for the input 'image'"):
        quantize(chain, out, [{"picture": normal(1, 3, 12, 12)}])
    with pytest.raises(InputError, match="cannot be run on the samples"):
        quantize(chain, out, [{"image": normal(1, 4, 12, 12)}])
    with pytest.raises(ValueError, match="guess"):
        quantize(chain, out, FEEDS, method="guess")
    quantize(chain, out, FEEDS)
    with pytest.raises(InputError, match="quantized already"):
        quantize(out, tmp_path / "again.onnx", FEEDS)


def test_a_network_without_anything_to_quantize_is_refused(tmp_path: Path) -> None:
    model = onnx_model("f (float[1,4] x) => (float[1,4] y) { y = LpNormalization(x) }", {})
    onnx.save(model, tmp_path / "none.onnx")
    with pytest.raises(UnsupportedError, match="has no operator that can be quantized"):
        quantize(tmp_path / "none.onnx", tmp_path / "int8.onnx", [{"x": normal(1, 4)}])


def test_an_operator_set_that_cannot_be_converted_is_refused(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
        raise RuntimeError(f"No Adapter To Version ${version} for Conv")

    monkeypatch.setattr(onnx.version_converter, "convert_version", fail)
    onnx.save(network(9), chain.with_name("old.onnx"))
    with pytest.raises(
        UnsupportedError, match=r"operator set 9, .* takes 13.*No Adapter To Version \$17.*export it again"
    ):
        quantize(chain.with_name("old.onnx"), chain.with_name("int8.onnx"), FEEDS)


def test_a_sum_of_two_is_an_addition_on_bytes(tmp_path: Path) -> None:
    """Also where nothing behind it is quantized at its input: the pool's rounding stays apart from the sum's."""
    body = """
    network (float[N,3,8,8] image) => (float[N,6,1,1] y) {
        a = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (image, u)
        b = Conv <kernel_shape = [1,1]> (image, v)
        c = OPERATOR (a, b)
        d = Relu (c)
        y = GlobalAveragePool (d)
    }
    """
    feeds = [{"image": normal(1, 3, 8, 8, seed=seed)} for seed in range(4)]
    found = []
    for operator in ("Sum", "Add"):
        weights = {"u": normal(6, 3, 3, 3), "v": normal(6, 3, 1, 1)}
        onnx.save(onnx_model(body.replace("OPERATOR", operator), weights), tmp_path / f"{operator}.onnx")
        quantize(tmp_path / f"{operator}.onnx", tmp_path / "int8.onnx", feeds)
        graph = read_qdq(tmp_path / "int8.onnx")
        found.append([type(operation).__name__ for operation in graph.operations])
    assert found[0] == found[1]
    assert "QSum" in found[0] and "QHost" not in found[0]
