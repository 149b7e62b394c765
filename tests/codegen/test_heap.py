"""What a large array costs that follows another one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FAULTS = """
import resource, sys
import numpy as np
from codegen.heap import HELD_BYTES, keep_freed_memory

print(int(sys.argv[1] == "held" and keep_freed_memory()))

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def touched(size):
    np.empty(size, np.uint8)[:: 4096] = 1

touched(HELD_BYTES // 4)
start = faults()
for _ in range(20):
    touched(HELD_BYTES // 4)
print(faults() - start)
"""


def run(*arguments: str, script: str = FAULTS, **more: str) -> tuple[bool, int]:
    made = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment = made | {"PYTHONPATH": str(ROOT), **more}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    held, count = done.stdout.split()
    return held == "1", int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_an_array_takes_the_place_of_the_one_before_it() -> None:
    held, few = run("held")
    if not held:
        pytest.skip("the C library is not glibc")
    _, many = run("not held")
    assert few < many / 10


def test_the_user_s_own_settings_stand() -> None:
    assert run("held", MALLOC_ARENA_MAX="2")[0] is False
    assert run("held", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] is False


HEAPS = """
import ctypes, gc, sys, tempfile, threading
from codegen.heap import collect_seldom, keep_freed_memory

before = gc.get_threshold()
collect_seldom()
assert gc.get_threshold()[0] > 10 * before[0] and gc.get_threshold()[1:] == before[1:]
held = sys.argv[1] == "held" and keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = library.fopen.restype = ctypes.c_void_p
met = threading.Barrier(8)

def allocate():
    library.malloc(100_000)
    met.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(library.fopen(file.name.encode(), b"w"))
    library.malloc_info(0, stream)
    library.fclose(stream)
    print(int(held), file.read().count(b"<heap nr="))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_all_threads_share_one_heap() -> None:
    held, count = run("held", script=HEAPS)
    if not held:
        pytest.skip("the C library is not glibc")
    assert count == 1
    assert run("not held", script=HEAPS)[1] > 1
