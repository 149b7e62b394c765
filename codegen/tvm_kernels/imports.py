"""Imports TVM in a second instead of a minute.

TVM's script parser calls ``inspect.stack()`` for every intrinsic that it registers, which reads the source of every
frame and searches all loaded modules each time: 40 s where torch is loaded. Nothing here needs what it finds.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def load_tvm() -> Any:
    """The ``tvm`` module, with everything imported that the kernels need. torch is neither needed nor loaded."""
    with quick_imports():
        tvm = importlib.import_module("tvm")
        for name in ("relax", "te", "tirx", "topi", "s_tir", "s_tir.dlight"):
            importlib.import_module(f"tvm.{name}")
    return tvm


def load_importer() -> None:
    """What compiling an ONNX file takes: TVM and its frontend. For a process that has no request yet."""
    load_tvm()
    importlib.import_module("tvm.relax.frontend.onnx.onnx_frontend")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Disarms ``inspect.stack`` and hides a torch that is not loaded yet, while TVM's modules are imported."""
    stack, hidden = inspect.stack, "torch" not in sys.modules
    inspect.stack = lambda *_args, **_kwargs: []
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.stack = stack
        if hidden:
            del sys.modules["torch"]
