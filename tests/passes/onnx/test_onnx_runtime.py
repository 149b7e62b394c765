from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes.onnx_runtime import exact_session


@pytest.mark.parametrize("signed", [False, True])
def test_sums_of_bytes_do_not_saturate(signed: bool) -> None:
    """Pairs of products of the largest bytes, which do not fit into 16 bits; an int8 operator has a session too."""
    kind, dtype = (TensorProto.INT8, np.int8) if signed else (TensorProto.UINT8, np.uint8)
    x = np.full((1, 16, 3, 3), np.iinfo(dtype).max, dtype)
    weight = np.full((8, 16, 1, 1), 127, np.int8)
    weight[1::2] = -127
    constants = {
        "one": np.float32(1), "large": np.float32(2**14), "x0": dtype(0), "w": weight, "w0": np.int8(0), "y0": dtype(0)
    }  # fmt: skip
    node = helper.make_node("QLinearConv", ["x", "one", "x0", "w", "one", "w0", "large", "y0"], ["y"])
    graph = helper.make_graph(
        [node],
        "bytes",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", kind, (1, 8, 3, 3))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (found,) = exact_session(model.SerializeToString(), onnxruntime.SessionOptions()).run(None, {"x": x})
    sums = np.einsum("nchw,oc->nohw", x.astype(np.int64), weight[:, :, 0, 0].astype(np.int64))
    wanted = np.clip(np.rint(sums / 2**14), np.iinfo(dtype).min, np.iinfo(dtype).max)
    np.testing.assert_array_equal(found, wanted)
