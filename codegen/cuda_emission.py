"""What is deployed on a GPU: a library that carries its kernels as PTX, and their source; timed where a GPU is."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from codegen.cuda_build import PTX, SOURCE, CudaBuild, build_cuda
from codegen.cuda_driver import FoundGpu
from codegen.cuda_gpus import Gpu
from codegen.cuda_run import run_on_gpu
from codegen.dataset import random_inputs
from codegen.emission import LIBRARY, Emission, EmissionRequest, checked, fitting, measured
from codegen.events import Events
from codegen.onnx_runs import run_file
from codegen.tune.statistics import CONFIDENCE, ratio
from codegen.tvm_build import NoBinary
from codegen.tvm_check import difference
from passes.core.cost import Cost
from passes.errors import UnsupportedError
from passes.onnx_graph import OnnxGraph

BLOCKS, CALLS = 12, 20
"""Rounds in which the libraries take turns, and calls of each in a round."""
_DENSE, _REWRITTEN = "input", "result"


class CudaEmitter:
    """Emits for ``gpu``. ``here``: what :func:`codegen.cuda_driver.find_gpu` says of this machine.

    One per run: it keeps the input's library, to time the result's beside it.
    """

    def __init__(self, gpu: Gpu, here: FoundGpu | str) -> None:
        self.gpu = gpu
        self._obstacle = here if isinstance(here, str) else ""
        if isinstance(here, FoundGpu) and not here.runs(gpu.arch):
            self._obstacle = f"{here.name} has {here.arch}, older than {gpu.arch}"
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._dense: CudaBuild | None = None

    def close(self) -> None:
        """Removes the input's library."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def baseline(self, model: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, events: Events) -> Cost | None:
        """Builds the network as it came and times it; None where there is no GPU to run it on.

        Raises UnsupportedError with the node, for a network that has no library.
        """
        if self._obstacle:
            return None
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="rankc-")
        self._dense = self._built(model, Path(self._folder.name), shapes, events)
        graph = OnnxGraph.read(model, dict(shapes))
        feeds = list(random_inputs(graph.inputs, shapes, 1, seed).batches(1))
        with events.stage("time the input"):
            _, samples = run_on_gpu({_DENSE: self._dense.binary.library}, feeds, blocks=BLOCKS, calls=CALLS)
        return measured(samples[_DENSE])

    def __call__(self, request: EmissionRequest) -> Emission:
        """Writes model.so, model.cu and model.ptx. Without a GPU nothing is measured, and a warning says so.

        UnsupportedError as in :meth:`baseline`; VerificationError where a GPU computes something else than onnxruntime.
        """
        made = self._built(request.model, request.folder, request.shapes, request.events, request.plan)
        artifacts: dict[str, str | None] = {"binary": LIBRARY, "cuda_source": SOURCE, "ptx": PTX}
        if self._obstacle:
            request.events.warning(
                f"{LIBRARY} was not run: this machine has {self._obstacle}; latencies are estimates for {self.gpu.name}"
            )
            return Emission(artifacts)
        feeds = fitting(made.binary, request.samples)
        libraries = {_REWRITTEN: made.binary.library}
        if self._dense is not None:
            libraries[_DENSE] = self._dense.binary.library
        with request.events.stage("run on the GPU"):
            outputs, samples = run_on_gpu(libraries, feeds, blocks=BLOCKS, calls=CALLS)
        found = difference(outputs[_REWRITTEN], run_file(request.model, feeds, apart=True))
        check = checked(made.binary, found, f"{LIBRARY} on the GPU")
        costs = {name: measured(times) for name, times in samples.items()}
        return Emission(
            artifacts,
            check,
            costs[_REWRITTEN],
            baseline=costs.get(_DENSE),
            comparison=ratio(samples[_REWRITTEN], samples[_DENSE], CONFIDENCE) if _DENSE in samples else None,
        )

    def _built(
        self, model: Path, folder: Path, shapes: Mapping[str, tuple[int, ...]], events: Events, plan: str = ""
    ) -> CudaBuild:
        with events.stage("compile"):
            made = build_cuda(model, folder, LIBRARY, shapes, self.gpu, plan=plan)
        if isinstance(made, NoBinary):
            raise UnsupportedError(f"{model.name}: {made.reason}")
        for note in made.notes:
            events.note(note)
        return made
