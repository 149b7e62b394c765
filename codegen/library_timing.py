"""Times compiled libraries and ONNX files against each other, in one fresh process that is pinned to its processors.

Contenders take turns in short blocks, so that whatever disturbs the machine disturbs all of them, and two numbers of
one run can be compared. What the raw samples say is up to :mod:`codegen.tune.statistics`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from codegen.child_process import Failure, call
from codegen.tune.statistics import LEAST_BLOCKS
from codegen.tvm_build import Binary
from codegen.tvm_network import Kernel
from passes.errors import VerificationError

Array = NDArray[Any]

_BLOCK_S, _MOST_BLOCKS = 0.008, 80


@dataclass(frozen=True, eq=False)
class Contender:
    """A library, or an ONNX file, which onnxruntime runs with all of its optimizations.

    ``feeds``: one set of inputs, in the order of the library's parameters.
    """

    name: str
    path: Path
    feeds: Mapping[str, Array]

    @classmethod
    def of(cls, name: str, binary: Binary, feeds: Mapping[str, Array]) -> Contender:
        """The library of ``binary``, with its inputs in its order."""
        return cls(name, binary.library, {key: feeds[key] for key in binary.inputs})


@dataclass(frozen=True, eq=False)
class Samples:
    """``seconds`` of single calls, (blocks, calls): row i was measured beside row i of the other contenders.

    ``outputs``: what the contender computed.
    """

    name: str
    seconds: NDArray[np.float64]
    outputs: tuple[Array, ...]


@dataclass(frozen=True)
class KernelTimes:
    """``seconds`` of single calls of a kernel by itself, its operands in the cache."""

    kernel: Kernel
    seconds: tuple[float, ...]

    @property
    def least_s(self) -> float:
        """Of one call."""
        return min(self.seconds)

    @property
    def total_s(self) -> float:
        """Of the calls of one inference, each at its least."""
        return self.kernel.calls * self.least_s


def time_together(
    contenders: Sequence[Contender],
    *,
    blocks: int,
    calls: int,
    threads: int = 1,
    timeout_s: float | None = None,
) -> list[Samples]:
    """``blocks`` rounds in which each contender is called once for nothing and ``calls`` times by the clock.

    The order changes from round to round. Inputs are in memory and outputs stay there: neither side is charged for
    copies. VerificationError where a contender cannot be loaded, crashes, or refuses its inputs.
    """
    if not contenders or blocks < 1 or calls < 1:
        raise ValueError("timing needs a contender, a block and a call")
    with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
        given, made = Path(folder) / "inputs.npz", Path(folder) / "made.npz"
        write_feeds(given, contenders)
        request = {
            "contenders": [{"path": str(c.path.absolute()), "inputs": list(c.feeds)} for c in contenders],
            "given": str(given),
            "made": str(made),
            "blocks": blocks,
            "calls": calls,
            "threads": threads,
        }
        answer = _asked(request, threads, timeout_s)
        return read_samples(made, contenders, answer["outputs"])


def write_feeds(path: Path, contenders: Sequence[Contender]) -> None:
    """Writes the inputs of all contenders to an .npz, as the process that times them reads them."""
    arrays = {
        f"{index}/{i}": np.asarray(value)
        for index, contender in enumerate(contenders)
        for i, value in enumerate(contender.feeds.values())
    }
    np.savez(path, allow_pickle=False, **arrays)


def read_samples(path: Path, contenders: Sequence[Contender], outputs: Sequence[int]) -> list[Samples]:
    """What the process that timed the contenders has written; ``outputs``: how many each of them has."""
    with np.load(path, allow_pickle=False) as archive:
        return [
            Samples(
                contender.name,
                archive[f"{index}/seconds"],
                tuple(archive[f"{index}/{i}"] for i in range(outputs[index])),
            )
            for index, contender in enumerate(contenders)
        ]


class Together(Protocol):
    """:func:`time_together`, here or on a device of a farm."""

    def __call__(
        self, contenders: Sequence[Contender], *, blocks: int, calls: int, threads: int = 1
    ) -> list[Samples]: ...


def time_in_blocks(
    contenders: Sequence[Contender], threads: int = 1, *, budget_s: float, together: Together = time_together
) -> dict[str, NDArray[np.float64]]:
    """Seconds of single calls by name, (blocks, calls), of contenders that take turns.

    Blocks of about 8 ms, 80 of them, or fewer of slow networks, so that all of it takes about ``budget_s``.
    """
    first = together(contenders, blocks=1, calls=3, threads=threads)
    slowest_s = max(float(samples.seconds.min()) for samples in first)
    calls = int(np.clip(_BLOCK_S / slowest_s, 1, 20))
    blocks = int(np.clip(budget_s / (slowest_s * (calls + 1) * len(contenders)), LEAST_BLOCKS + 2, _MOST_BLOCKS))
    found = together(contenders, blocks=blocks, calls=calls, threads=threads)
    return {samples.name: samples.seconds for samples in found}


def time_side_by_side(
    libraries: Mapping[str, Path],
    files: Mapping[str, Path],
    feeds: Mapping[str, Array],
    threads: int = 1,
    *,
    budget_s: float = 15.0,
) -> dict[str, NDArray[np.float64]]:
    """:func:`time_in_blocks` of libraries and ONNX files on one set of inputs."""
    contenders = [Contender(name, path, feeds) for name, path in (*libraries.items(), *files.items())]
    return time_in_blocks(contenders, threads, budget_s=budget_s)


def time_library(
    library: Path, feeds: Mapping[str, Array], repeats: int, *, threads: int = 1, timeout_s: float | None = None
) -> list[float]:
    """Seconds of ``repeats`` single calls of one library or ONNX file; see :func:`time_together`."""
    (samples,) = time_together(
        [Contender(library.name, library, feeds)], blocks=1, calls=repeats, threads=threads, timeout_s=timeout_s
    )
    return [float(value) for value in samples.seconds.ravel()]


def profile(binary: Binary, *, repeats: int, threads: int = 1, timeout_s: float | None = None) -> list[KernelTimes]:
    """Each kernel of the library by itself on random values, in the order of the network's calls.

    The sum over the calls is what the network takes within a few percent, a little more where its weights do not fit
    into the cache. Kernels of symbolic shapes are left out, and those that are not called after all.
    VerificationError where the process fails.
    """
    kernels = [kernel for kernel in binary.kernels if all(size >= 0 for shape, _ in kernel.arguments for size in shape)]
    request = {
        "library": str(binary.library.absolute()),
        "kernels": [asdict(kernel) for kernel in kernels],
        "repeats": repeats,
        "threads": threads,
    }
    answer = _asked(request, threads, timeout_s)
    found = zip(kernels, answer["seconds"], strict=True)
    return [KernelTimes(kernel, tuple(seconds)) for kernel, seconds in found if seconds]


def _asked(request: Mapping[str, Any], threads: int, timeout_s: float | None) -> dict[str, Any]:
    environment = {
        "TVM_USE_RUNTIME_LIB": "1",
        "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",
        "TVM_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
    }
    answer = call("codegen.tvm_time_child", request, environment=environment, timeout_s=timeout_s)
    if isinstance(answer, Failure):
        raise VerificationError(f"what was to be timed in a fresh process {answer.reason}")
    return answer
