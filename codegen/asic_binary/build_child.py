"""The compiling process of :mod:`codegen.asic_binary.build`.

A node ``RankcProgram`` becomes a call of an external function in destination-passing style, and the functions come
with the module as its external module, which is what TVM's own code generators leave behind (BYOC). The programs lie
in the library's read-only data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codegen.child_process import reply
from codegen.runner.attach import attach, describe
from codegen.tune.device import Device
from codegen.tvm_kernels.imports import load_importer, load_tvm
from codegen.tvm_network import compiled, imported, lowered
from codegen.tvm_network_link import linker
from codegen.tvm_network_onnx import Refused

_HERE = Path(__file__).parent


def source(segments: list[dict[str, Any]]) -> str:
    """C++ of the external functions; the programs are included from their files when it is compiled."""
    most = max((s["inputs"] + len(s["outputs"]) for s in segments), default=1)
    text = [(_HERE / "rankc_driver.h").read_text(encoding="utf-8"), f"#define MOST_TENSORS {most}"]
    text.append((_HERE / "trampoline.cc").read_text(encoding="utf-8"))
    for k, segment in enumerate(segments):
        path = json.dumps(segment["program"])
        text.append(
            f'__asm__(".pushsection .rodata\\n.balign 16\\nrankc_begin_{k}:\\n.incbin {json.dumps(path)[1:-1]}\\n'
            f'rankc_end_{k}:\\n.byte 0\\n.popsection\\n");\n'
            f'extern "C" const char rankc_begin_{k}[], rankc_end_{k}[];\n'
            f'static Segment segment_{k} = {{"segment {k}", rankc_begin_{k}, rankc_end_{k}, {segment["inputs"]}, '
            f"{len(segment['outputs'])}, nullptr, nullptr}};\n"
            f'extern "C" int __tvm_ffi_{_symbol(k)}(void*, const TVMFFIAny* arguments, int32_t count, TVMFFIAny*) {{\n'
            f"  return run(segment_{k}, arguments, count);\n}}\n"
        )
    return "\n".join(text)


def _symbol(segment: int) -> str:
    return f"rankc_segment_{segment}"


def _build(request: Mapping[str, Any]) -> dict[str, Any]:
    import onnx

    segments = request["segments"]
    device = Device(**request["device"])
    linker(device)  # says what is missing before anything is compiled
    tvm = load_tvm()
    from tvm import relax
    from tvm.relax.frontend.onnx import onnx_frontend
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

    class RankcProgram(onnx_frontend.OnnxOpConverter):  # type: ignore[misc]
        @classmethod
        def _impl_v1(cls, builder: Any, inputs: Any, attributes: dict[str, Any], params: Any) -> Any:
            segment = int(attributes["segment"])
            types = [relax.TensorType(o["shape"], o["dtype"]) for o in segments[segment]["outputs"]]
            made = relax.call_dps_packed(
                _symbol(segment), relax.Tuple(list(inputs)), types[0] if len(types) == 1 else types
            )
            return builder.normalize(made)

    known = onnx_frontend._get_convert_map
    onnx_frontend._get_convert_map = lambda: {**known(), "RankcProgram": RankcProgram}
    model = onnx.load(request["model"])
    module = imported(model)
    inputs, outputs = [[value.name for value in values] for values in (model.graph.input, model.graph.output)]
    metadata = describe(module, inputs, outputs, device.target, device=f"{device.model} and an accelerator")
    names = [_symbol(k) for k in range(len(segments))]
    external = tvm.get_global_func("runtime.CSourceModuleCreate")(source(segments), "cc", names, [])
    made = lowered(module, device, lambda _: None)
    includes = [f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
    library = Path(request["library"])
    compiled(attach(made.module.with_attr("external_mods", [external]), metadata), device, library, includes)
    return {}


if __name__ == "__main__":
    reply(_build, Refused, load_importer)
