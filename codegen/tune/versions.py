"""What a trial depends on besides its workload, its device and its schedule: the code that builds the kernel."""

from __future__ import annotations

from codegen.tvm_versions import REQUIRED

TEMPLATES = 1
"""Raised whenever a template builds another kernel from the same parameters: times of before are not used then."""


def versions_key() -> str:
    """Names the code generator in the database. The compiler is the one that rankc insists on."""
    return f"tvm {REQUIRED['apache-tvm']}, templates {TEMPLATES}"
