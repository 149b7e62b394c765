"""What is deployed on a processor: the network's binary with the tuned schedules, timed beside that of the input."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from codegen.cpu_latency import CpuLatency
from codegen.cpu_trials import DeviceTrials
from codegen.dataset import random_inputs
from codegen.emission import LIBRARY, Emission, EmissionRequest, Feeds, checked, fitting, measured
from codegen.events import Events
from codegen.farm.measurer import FarmMeasurer
from codegen.library_timing import Contender as Timed
from codegen.library_timing import time_in_blocks, time_together
from codegen.report.build import BinaryCheck
from codegen.report.measurement import Contender, MeasurementReport
from codegen.tune.device import Device
from codegen.tune.statistics import CONFIDENCE, ratio, summary
from codegen.tune.workload import Workload
from codegen.tvm_build import Binary, NoBinary, build
from codegen.tvm_check import check_binary, difference
from passes.core.cost import Cost
from passes.errors import UnsupportedError
from passes.onnx_graph import OnnxGraph

Array = NDArray[Any]

_TIMING_S = 40.0
"""About how long the timing of all contenders may take."""

_DENSE, _REWRITTEN = "tuned binary of the input", "tuned binary of the result"
_DENSE_ORT, _REWRITTEN_ORT = "onnxruntime on the input", "onnxruntime on the result"


class CpuEmitter:
    """Emits for ``device``; ``here``: its code runs on this host. One per run: it keeps the input's binary."""

    def __init__(self, device: Device, prices: CpuLatency, trials: DeviceTrials, here: bool) -> None:
        self.device, self.here = device, here
        self._prices, self._trials = prices, trials
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._dense: Binary | None = None

    def close(self) -> None:
        """Ends the measuring processes and removes the input's binary."""
        self._trials.close()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def baseline(self, model: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, events: Events) -> Cost | None:
        """Tunes and builds the network as it came, and times it; None where the device is not here and on no farm.

        Raises UnsupportedError with the node, for a network that has no binary.
        """
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="rankc-")
        graph = OnnxGraph.read(model, {name: tuple(shape) for name, shape in shapes.items()})
        # Compiled before it is tuned: what cannot be compiled is not worth a trial.
        self._dense = self._built(model, Path(self._folder.name) / LIBRARY, shapes, events)
        self._prices.measure([op.stage for op in graph.workload() if op.stage is not None], events)
        farm = self._trials.farm(events)
        if not self.here and farm is None:
            return None
        feeds = next(iter(random_inputs(graph.inputs, shapes, 1, seed).batches(1)))
        with events.stage("time the input"):
            samples = self._timed([Timed.of(_DENSE, self._dense, feeds)], farm)
        return measured(samples[_DENSE])

    def __call__(self, request: EmissionRequest) -> Emission:
        """Writes model.so, checks it against onnxruntime and times it; see :meth:`baseline` for errors.

        VerificationError where the binary does not compute what onnxruntime computes.
        """
        events = request.events
        binary = self._built(request.model, request.folder / LIBRARY, request.shapes, events, request.plan)
        farm = self._trials.farm(events)
        if not self.here and farm is None:
            events.warning(f"{LIBRARY} is for {self.device.model} and was not run: its latency is estimated")
            return Emission({"binary": LIBRARY})
        feeds = fitting(binary, request.samples)
        with events.stage("check the binary"):
            check = self._check(binary, request.model, feeds, farm)
        assert self._dense is not None, "the input is compiled before any result"
        with events.stage("time the binaries"):
            contenders = [Timed.of(_DENSE, self._dense, feeds[0]), Timed.of(_REWRITTEN, binary, feeds[0])]
            if farm is None:
                contenders.append(Timed(_DENSE_ORT, request.original, feeds[0]))
                contenders.append(Timed(_REWRITTEN_ORT, request.model, feeds[0]))
            samples = self._timed(contenders, farm)
            if farm is not None:
                events.note(f"timed on {farm.network_device} of the farm, beside no other engine")
                for line in farm.summary().lines():
                    events.note(line)
        gained = ratio(samples[_REWRITTEN], samples[_DENSE], CONFIDENCE)
        report = self._report(request, binary, samples)
        return Emission(
            {"binary": LIBRARY},
            check,
            measured(samples[_REWRITTEN]),
            baseline=measured(samples[_DENSE]),
            comparison=gained,
            measurement=report,
        )

    def _built(
        self, model: Path, library: Path, shapes: Mapping[str, tuple[int, ...]], events: Events, plan: str = ""
    ) -> Binary:
        """The binary with the best schedules known; layers of it that were never tuned are, and it is built again."""
        binary = self._compiled(model, library, shapes, events, plan)
        untuned = self._trials.wanting([Workload.parse(used.key) for used in binary.workloads if not used.tuned])
        if untuned and self._trials.make(untuned, events):
            binary = self._compiled(model, library, shapes, events, plan)
        for note in binary.notes:
            events.note(f"{model.name}: {note}")
        return binary

    def _compiled(
        self, model: Path, library: Path, shapes: Mapping[str, tuple[int, ...]], events: Events, plan: str
    ) -> Binary:
        schedules = self._trials.database.schedules(self.device)
        with events.stage("compile"):
            made = build(model, library, shapes, device=self.device, schedules=schedules, bind=True, plan=plan)
        if isinstance(made, NoBinary):
            raise UnsupportedError(f"{model.name}: {made.reason}")
        return made

    def _timed(self, contenders: Sequence[Timed], farm: FarmMeasurer | None) -> dict[str, Array]:
        """Seconds of single calls by contender, (blocks, calls)."""
        together = time_together if farm is None else farm.network
        return time_in_blocks(contenders, self.device.threads, budget_s=_TIMING_S, together=together)

    def _check(self, binary: Binary, model: Path, feeds: Sequence[Feeds], farm: FarmMeasurer | None) -> BinaryCheck:
        if farm is None:
            found = check_binary(binary, model, feeds)
        else:
            from codegen.onnx_runs import run_file

            runs = [Timed.of(str(index), binary, feed) for index, feed in enumerate(feeds)]
            made = farm.network(runs, blocks=1, calls=1, threads=self.device.threads)
            found = difference([samples.outputs for samples in made], run_file(model, feeds, apart=False))
        return checked(binary, found)

    def _report(self, request: EmissionRequest, binary: Binary, samples: Mapping[str, Array]) -> MeasurementReport:
        ops = OnnxGraph.read(request.model, dict(request.shapes)).workload()
        used = [Workload.parse(layer.key) for layer in binary.workloads]
        tally = self._trials.tally
        return MeasurementReport(
            self.device.model,
            self.device.threads,
            CONFIDENCE,
            tuple(_contender(name, times, samples[_DENSE]) for name, times in samples.items()),
            self._prices.network(ops).latency,
            str(self._trials.database.path),
            tally.made,
            tally.failed,
            len({w for w in used if w not in tally.tuned}),
            tuple(layer.key for layer in binary.workloads if not layer.tuned),
            binary.notes,
        )


def _contender(name: str, samples: Array, dense: Array) -> Contender:
    found = summary(samples.ravel().tolist())
    plain = Contender(name, found.seconds, found.p10, found.median, samples.size)
    if name == _DENSE:
        return plain
    against = ratio(samples, dense, CONFIDENCE)
    return replace(plain, ratio=against.value, low=against.low, high=against.high)
