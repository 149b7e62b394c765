"""Torch's operators by the names that price lists know, ONNX's, and whether one may be computed early or dropped.

nn.MaxPool2d, F.max_pool2d, torch.ops.aten.max_pool2d.default, x.max_pool2d()   ->   MaxPool
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

if TYPE_CHECKING:
    from passes.fx_network import Network

CONVOLUTIONS = frozenset({"conv", "convtranspose", "convolution"})
PRODUCTS = frozenset({"linear", "matmul", "mm", "addmm"})
RECURRENT = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "rnntanh": "RNN", "rnnrelu": "RNN"}
FOREIGN = {
    **dict.fromkeys(RECURRENT, "recurrent layers are not rewritten"),
    **dict.fromkeys(("lstmcell", "grucell", "rnncell"), "recurrent layers are not rewritten"),
    **dict.fromkeys(("einsum", "tensordot", "inner", "chainmatmul"), "an Einsum or its like is not rewritten"),
    **dict.fromkeys(("bmm", "baddbmm", "addbmm"), "it multiplies a batch of matrices"),
    **dict.fromkeys(("mv", "addmv", "dot"), "it multiplies with a vector"),
    "bilinear": "a bilinear layer is not rewritten",
    "scaleddotproductattention": "both operands of its products are computed",
    "scaleddotproductflashattentionforcpu": "both operands of its products are computed",
    **dict.fromkeys(
        ("multiheadattention", "multiheadattentionforward", "transformerencoderlayer", "transformerdecoderlayer"),
        "its linear layers lie inside of it: torch.export opens it, so export the network to .pt2",
    ),
    **dict.fromkeys(("transformer", "transformerencoder", "transformerdecoder"), "its layers lie inside of it"),
    **dict.fromkeys(("convtbc", "deformconv"), "this kind of convolution is not rewritten"),
}
"""Operators that hold or multiply weights and are never sites, with the reason."""

KIN = CONVOLUTIONS | PRODUCTS | frozenset(FOREIGN)
"""Operators that hold weights to multiply with: each is a site or is kept with a reason."""

_ONNX = {
    **{"conv": "Conv", "convolution": "Conv", "convtranspose": "ConvTranspose", "linear": "MatMul"},
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv"), "MatMul"),
    **RECURRENT,
    **{"relu": "Relu", "relu6": "Clip", "hardtanh": "Clip", "clamp": "Clip", "clip": "Clip", "clampmin": "Clip"},
    **{"leakyrelu": "LeakyRelu", "prelu": "PRelu", "prelukernel": "PRelu", "sigmoid": "Sigmoid", "silu": "Swish"},
    **{"hardsigmoid": "HardSigmoid", "hardswish": "HardSwish", "tanh": "Tanh", "elu": "Elu", "selu": "Selu"},
    **{"celu": "Celu", "gelu": "Gelu", "mish": "Mish", "softplus": "Softplus", "softsign": "Softsign"},
    **{"threshold": "ThresholdedRelu", "identity": "Identity", "detach": "Identity", "contiguous": "Identity"},
    **dict.fromkeys(("dropout", "featuredropout", "alphadropout", "featurealphadropout"), "Dropout"),
    **dict.fromkeys(("clone", "alias", "liftfreshcopy"), "Identity"),
    **dict.fromkeys(("to", "tocopy", "float", "double", "half", "type", "long", "int", "bool"), "Cast"),
    **dict.fromkeys(("add", "iadd"), "Add"),
    **dict.fromkeys(("sub", "isub", "rsub"), "Sub"),
    **dict.fromkeys(("mul", "imul"), "Mul"),
    **dict.fromkeys(("div", "truediv", "itruediv"), "Div"),
    **{"pow": "Pow", "abs": "Abs", "neg": "Neg", "sqrt": "Sqrt", "exp": "Exp", "log": "Log", "erf": "Erf"},
    **{"reciprocal": "Reciprocal", "sin": "Sin", "cos": "Cos", "floor": "Floor", "ceil": "Ceil", "round": "Round"},
    **{"maximum": "Max", "minimum": "Min", "where": "Where", "eq": "Equal", "gt": "Greater", "lt": "Less"},
    **{"ge": "GreaterOrEqual", "le": "LessOrEqual", "sign": "Sign", "isnan": "IsNaN", "remainder": "Mod"},
    **dict.fromkeys(("maxpool", "maxpool2dwithindices", "maxpool3dwithindices", "adaptivemaxpool"), "MaxPool"),
    **{"avgpool": "AveragePool", "lppool": "LpPool"},
    **dict.fromkeys(("adaptiveavgpool",), "AveragePool"),
    **{"mean": "ReduceMean", "sum": "ReduceSum", "prod": "ReduceProd", "amax": "ReduceMax", "amin": "ReduceMin"},
    **{"max": "ReduceMax", "min": "ReduceMin", "norm": "ReduceL2", "logsumexp": "ReduceLogSumExp"},
    **{"argmax": "ArgMax", "argmin": "ArgMin", "cumsum": "CumSum"},
    **dict.fromkeys(("batchnorm", "nativebatchnorm", "nativebatchnormlegitnotraining"), "BatchNormalization"),
    **{"softmax": "Softmax", "logsoftmax": "LogSoftmax"},
    **dict.fromkeys(("layernorm", "nativelayernorm"), "LayerNormalization"),
    **dict.fromkeys(("groupnorm", "nativegroupnorm"), "GroupNormalization"),
    **{"instancenorm": "InstanceNormalization", "localresponsenorm": "LRN", "rmsnorm": "RMSNormalization"},
    **{"normalize": "LpNormalization", "cat": "Concat", "concat": "Concat", "stack": "Concat"},
    **dict.fromkeys(("split", "chunk", "unbind", "tensorsplit", "splitwithsizes"), "Split"),
    **dict.fromkeys(("getitem", "slice", "select", "narrow", "index"), "Slice"),
    **dict.fromkeys(("transpose", "permute", "t", "movedim", "swapaxes"), "Transpose"),
    **dict.fromkeys(("pad", "constantpad", "constantpadnd", "zeropad", "reflectionpad", "replicationpad"), "Pad"),
    **{"gather": "Gather", "indexselect": "Gather", "embedding": "Gather", "expand": "Expand", "expandas": "Expand"},
    **{"repeat": "Tile", "tile": "Tile", "pixelshuffle": "DepthToSpace", "pixelunshuffle": "SpaceToDepth"},
    **dict.fromkeys(("interpolate", "upsample", "upsamplenearest", "upsamplebilinear"), "Resize"),
    **dict.fromkeys(("view", "reshape", "viewas", "unsafeview", "unflatten"), "Reshape"),
    **{"flatten": "Flatten", "squeeze": "Squeeze", "unsqueeze": "Unsqueeze", "size": "Shape"},
}

_RANDOM = re.compile(r"rand|normal$|bernoulli|multinomial|poisson|dropout|rrelu|exponential|uniform|empty")
_ASSERTIONS = ("symconstrainrange", "asserttensormetadata", "assertscalar", "assertasync", "assert")


def torch_name(net: Network, node: fx.Node) -> str:
    """The operator in lower case letters, without dimensions: "conv" for nn.Conv2d and aten.conv2d.default."""
    name = raw_name(net, node)
    if node.op == "call_module" or not name.startswith("__"):
        name = name.rstrip("_")
    name = re.sub(r"(?<=[a-zA-Z])[123]d$", "", name)
    return name.replace("_", "").lower()


def raw_name(net: Network, node: fx.Node) -> str:
    """As torch calls it: a class, a function or a method."""
    if node.op == "call_module":
        return type(net.called(node)).__name__
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).rpartition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def onnx_name(net: Network, node: fx.Node) -> str:
    """ONNX's name of the operator; torch's own where ONNX has none."""
    return _ONNX.get(torch_name(net, node), raw_name(net, node))


def bound(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a call by parameter name; aten's "self" is the first of ``names``."""
    found = dict(zip(names, node.args, strict=False))
    found.update({names[0] if name == "self" else name: value for name, value in node.kwargs.items()})
    return found


def has_hooks(module: nn.Module) -> bool:
    """True if calling the module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def writes(net: Network, node: fx.Node) -> bool:
    """True if the node changes a tensor that it was given, or may."""
    if node.op == "call_module":
        return bool(getattr(net.called(node), "inplace", False)) or not _is_known(net, node)
    if node.kwargs.get("inplace") is True or "out" in node.kwargs:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = raw_name(net, node)
    if node.op == "call_method":
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imatmul", "ipow", "iand", "ior"):
        return True
    positional = name in _INPLACE_AT and len(node.args) > _INPLACE_AT[name] and node.args[_INPLACE_AT[name]] is True
    return positional or (name.endswith("_") and not name.endswith("__")) or not _is_known(net, node)


_INPLACE_AT = {
    **{"relu": 1, "relu6": 1, "selu": 1, "hardswish": 1, "silu": 1, "mish": 1, "hardsigmoid": 1},
    **{"leaky_relu": 2, "elu": 2, "celu": 2, "hardtanh": 3, "threshold": 3},
    **{"dropout": 3, "dropout1d": 3, "dropout2d": 3, "dropout3d": 3, "alpha_dropout": 3, "feature_alpha_dropout": 3},
}
"""Where torch.nn.functional has its ``inplace``, which may also be given by position."""


def _is_known(net: Network, node: fx.Node) -> bool:
    """True for what torch and Python themselves bring: code of others may do anything."""
    if node.op == "call_module":
        module = net.called(node)
        home = type(module).__module__
        return home.startswith(("torch.nn.", "passes.training.")) and not has_hooks(module)
    return is_torchs_own(node)


def is_torchs_own(node: fx.Node) -> bool:
    """True for calls of functions of torch or Python, and of methods, which are those of tensors."""
    if node.op != "call_function":
        return node.op == "call_method"
    home = getattr(node.target, "__module__", None) or "torch"
    return isinstance(node.target, torch._ops.OpOverload) or home.split(".")[0] in _HOMES


def is_view(net: Network, node: fx.Node) -> bool:
    """True for nodes whose value may share memory with their input's."""
    return torch_name(net, node) in _VIEWS


_VIEWS = frozenset(
    {
        *("view", "viewas", "reshape", "flatten", "squeeze", "unsqueeze", "expand", "expandas", "detach", "alias"),
        *("getitem", "select", "slice", "narrow", "chunk", "split", "unbind", "tensorsplit", "splitwithsizes", "index"),
        *("transpose", "permute", "t", "movedim", "swapaxes", "unflatten", "contiguous", "to", "float", "identity"),
        *("asstrided", "diagonal", "real", "imag", "unfold", "dropout", "data", "getattr"),
    }
)
_HOMES = ("torch", "_operator", "math", "builtins", "operator")


def is_removable(net: Network, node: fx.Node) -> bool:
    """True if nothing is missed of the node but its value."""
    if is_assertion(net, node):
        return False
    return not writes(net, node) and not node.is_impure(impure_random=False)


def is_assertion(net: Network, node: fx.Node) -> bool:
    """True for nodes that compute nothing, and fail where the network must not be used."""
    return node.op == "call_function" and torch_name(net, node).startswith(_ASSERTIONS)


def is_pure(net: Network, node: fx.Node) -> bool:
    """True if the node's value depends on its inputs alone, and nothing else changes."""
    return is_removable(net, node) and _RANDOM.search(torch_name(net, node)) is None
