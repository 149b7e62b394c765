"""``model.so`` for an accelerator: its subgraphs are external functions that carry their programs (BYOC)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import onnx

from codegen.asic_binary.host_graph import host_graph
from codegen.asic_binary.segments import Cut
from codegen.child_process import Child, Failure
from codegen.cpu_device import generic_device
from codegen.tvm_build import Binary, NoBinary


def compiler() -> Child:
    """A process for one :func:`build`: it imports TVM while what is to be built is still in the making."""
    return Child("codegen.asic_binary.build_child")


def build(
    cut: Cut, programs: Sequence[bytes], library: Path, *, child: Child | None = None, timeout_s: float | None = None
) -> Binary | NoBinary:
    """Compiles the network around its segments with TVM; ``programs``: the container of each segment's program.

    The library takes and gives what the network does, for the shapes it was compiled for. It runs wherever TVM's
    runtime and a driver are (see rankc_driver.h). ``child``: a :func:`compiler` that was started before.
    """
    if len(programs) != len(cut.segments):
        raise ValueError(f"{len(programs)} programs for {len(cut.segments)} segments")
    graph = cut.graph
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        model = Path(folder) / "host.onnx"
        onnx.save(host_graph(cut, library.stem), model)
        paths = []
        for index, program in enumerate(programs):
            paths.append(Path(folder) / f"program_{index}.bin")
            paths[-1].write_bytes(program)
        segments = [
            {
                "program": str(path),
                "inputs": len(segment.graph.inputs),
                "outputs": [
                    {"shape": list(tensor.shape), "dtype": "int8" if tensor.signed else "uint8"}
                    for tensor in map(segment.graph.tensors.__getitem__, segment.graph.outputs)
                ],
            }
            for path, segment in zip(paths, cut.segments, strict=True)
        ]
        request = {
            "model": str(model),
            "library": str(library.absolute()),
            "segments": segments,
            "device": asdict(generic_device()),
        }
        with child or compiler() as compiling:
            answer = compiling.call(request, timeout_s=timeout_s)
    if isinstance(answer, Failure):
        return NoBinary(f"TVM's compiler {answer.reason}", answer.log)
    if "reason" in answer:
        return NoBinary(answer["reason"])
    shapes = {public: graph.tensors[name].shape for public, name in zip(graph.input_names, graph.inputs, strict=True)}
    return Binary(library, graph.input_names, graph.output_names, shapes, coarse=True)
