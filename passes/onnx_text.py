"""A stable, readable listing of an ONNX network: one line per node, constants by digest.

Equal listings mean equal networks; runs of a pass are compared by it, and --dump-ir writes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from onnx import AttributeProto, ValueInfoProto, helper

from passes.onnx_parts import MAIN
from passes.onnx_surgery import Scope, Surgery

_DIGITS = 12


def listing(surgery: Surgery) -> str:
    """Header, inputs, initializers, nodes in order with their bodies indented, outputs."""
    head = surgery.head
    opsets = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in head.opset_import)
    lines = [f"onnx ir {head.ir_version}, opset {opsets}"]
    lines += [f"metadata {prop.key} = {prop.value!r}" for prop in head.metadata_props]
    lines += [f"function {f.domain}::{f.name} sha256:{_digest(f)}" for f in head.functions]
    lines += _scope(surgery, surgery.scopes[MAIN], "")
    return "\n".join(lines) + "\n"


def _scope(surgery: Surgery, scope: Scope, indent: str) -> Iterator[str]:
    real = {t.name for t in scope.graph.inputs}
    yield from (f"{indent}input {_info(i)}" for i in scope.frame.input if i.name in real)
    for name, constant in scope.weights.items():
        weight = surgery.weight_of(constant)
        shape = ", ".join(map(str, weight.header.dims))
        yield f"{indent}constant {name} {weight.type_name}[{shape}] sha256:{weight.digest()[:_DIGITS]}"
    for node in scope.graph.nodes:
        message = surgery.messages[node.name]
        plain = [a for a in message.attribute if a.name not in node.attrs]
        options = ", ".join(_attribute(a) for a in sorted(plain, key=lambda a: a.name))
        op = f"{node.domain}::{node.op}" if node.domain else node.op
        reads, writes = ", ".join(t.name for t in node.inputs), ", ".join(t.name for t in node.outputs)
        yield f"{indent}{node.name}: {writes} = {op}({reads})" + (f" {{{options}}}" if options else "")
        for name in node.attrs:
            yield f"{indent}  {name}:"
            yield from _scope(surgery, surgery.scopes[f"{node.name}/{name}"], indent + "    ")
    yield from (f"{indent}output {_info(i)}" for i in scope.frame.output)


def _info(info: ValueInfoProto) -> str:
    if not info.type.HasField("tensor_type"):
        return f"{info.name} {info.type.WhichOneof('value') or '?'}"
    tensor = info.type.tensor_type
    dims = (str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    return f"{info.name} {helper.tensor_dtype_to_string(tensor.elem_type).split('.')[-1].lower()}[{', '.join(dims)}]"


def _attribute(attribute: AttributeProto) -> str:
    value = helper.get_attribute_value(attribute) if not attribute.ref_attr_name else f"${attribute.ref_attr_name}"
    if isinstance(value, bytes):
        return f"{attribute.name}={value.decode('utf-8', 'backslashreplace')}"
    if isinstance(value, (int, float, str)):
        return f"{attribute.name}={value}"
    if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
        return f"{attribute.name}={list(value)}"
    return f"{attribute.name}=sha256:{_digest(attribute)}"


def _digest(message: AttributeProto) -> str:
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()[:_DIGITS]
