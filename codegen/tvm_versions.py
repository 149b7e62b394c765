"""The one pair of TVM releases that works, checked without importing it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from passes.errors import InputError

REQUIRED = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
"""tvm 0.27 allows newer ffi releases, but dies of a segmentation fault with them when it serialises a module."""


def check_tvm() -> dict[str, str]:
    """The installed pair, package -> version; InputError of one line for any other pair or none."""
    found: dict[str, str] = {}
    for package, wanted in REQUIRED.items():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
        if found[package] != wanted:
            pins = " ".join(f"{name}=={number}" for name, number in REQUIRED.items())
            raise InputError(
                f"{package} {found[package]} is installed, but rankc runs with {wanted} alone (other pairs crash): "
                f"pip install {pins}"
            )
    return found
