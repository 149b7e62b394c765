"""A device that fails as FARM_FAULT says: times=FACTOR, slow=FACTOR, outputs, hang=CALLS, crash=CALLS, die=CALLS.

``times`` reports FACTOR times what was measured; ``slow`` also takes that long. ``outputs`` multiplies what kernels
compute by 1.01. After CALLS timings of a session, ``hang`` waits for ever, ``crash`` ends the session and ``die`` the
device.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from codegen.farm import server_child

_WRONG = """
#include <dlfcn.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>
typedef int (*Kernel)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
extern "C" int __tvm_ffi_kernel(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  static Kernel real = (Kernel)dlsym(dlopen(getenv("FARM_REAL"), RTLD_NOW), "__tvm_ffi_kernel");
  int code = real(self, args, count, result);
  const TVMFFIAny& last = args[count - 1];
  bool object = last.type_index == kTVMFFITensor;
  DLTensor* y = object ? (DLTensor*)((char*)last.v_obj + sizeof(TVMFFIObject)) : (DLTensor*)last.v_ptr;
  int64_t size = 1;
  for (int i = 0; i < y->ndim; ++i) size *= y->shape[i];
  for (int64_t i = 0; i < size; ++i) ((float*)((char*)y->data + y->byte_offset))[i] *= 1.01f;
  return code;
}
"""


def main(text: str) -> None:
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    import tvm_ffi
    from tvm.rpc import server

    fault, _, amount = os.environ["FARM_FAULT"].partition("=")
    if fault == "outputs":
        load, library = server._load_module, _compiled()
        server._load_module = lambda path: _wrong(load, path, library)
    else:
        timing = tvm_ffi.get_global_func("runtime.RPCTimeEvaluator")
        made: list[int] = []

        def evaluator(*arguments: Any) -> Any:
            real = timing(*arguments)
            made.append(1)
            return lambda *values: _timed(real(*values), fault, float(amount), len(made))

        tvm_ffi.register_global_func("runtime.RPCTimeEvaluator", evaluator, override=True)
    server_child.main(text)


def _timed(blob: Any, fault: str, amount: float, calls: int) -> bytes:
    data = bytes(blob)
    seconds = struct.unpack(f"@{len(data) // 8}d", data)
    if fault in ("times", "slow"):
        if fault == "slow":
            time.sleep((amount - 1) * sum(seconds))
        return struct.pack(f"@{len(seconds)}d", *(amount * value for value in seconds))
    if calls > amount:
        if fault == "hang":
            time.sleep(1e6)
        if fault == "die":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGSEGV)
    return data


def _compiled() -> Path:
    """Before the device serves: a look at it has a deadline."""
    import tvm_ffi

    folder = Path(tempfile.mkdtemp())  # in the farm's own folder
    source, library = folder / "wrong.cc", folder / "wrong.so"
    source.write_text(_WRONG)
    paths = [f"-I{folder}" for folder in tvm_ffi.libinfo.include_paths()]
    subprocess.run(["g++", "-shared", "-fPIC", *paths, str(source), "-o", str(library), "-ldl"], check=True)
    return library


def _wrong(load: Any, path: str, library: Path) -> Any:
    """What is loaded last is what is called next: its first call finds the real one in the environment."""
    os.environ["FARM_REAL"] = path
    _kept.append(load(path))
    return load(str(shutil.copy(library, Path(path).with_suffix(".wrong.so"))))


_kept: list[Any] = []

if __name__ == "__main__":
    main(sys.argv[1])
