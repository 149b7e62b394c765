"""Puts the metadata into a module that TVM is about to compile. TVM is imported when a function is called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from codegen.runner.metadata import SECTION, SYMBOL, Metadata, TensorInfo

_NUMBER = re.compile(r"T\.int64\((-?\d+)\)")
_PACKAGES = ("rankc", "apache-tvm", "apache-tvm-ffi")


def describe(
    module: Any,
    inputs: Sequence[str],
    outputs: Sequence[str],
    target: Mapping[str, Any],
    *,
    device: str = "",
    network: str = "",
    plan: str = "",
) -> Metadata:
    """The metadata of the Relax module's ``main``, whose parameters and results are named ``inputs`` and ``outputs``.

    Types are those that Relax has inferred, so any state of the module before it is lowered to bytecode will do.
    ValueError where the counts differ.
    """
    function = module["main"]
    result = function.ret_ty
    results = list(result.fields) if hasattr(result, "fields") else [result]
    parameters = [parameter.ty for parameter in function.params]
    if len(parameters) != len(inputs) or len(results) != len(outputs):
        raise ValueError(
            f"main takes {len(parameters)} and gives {len(results)} tensors, not {len(inputs)} and {len(outputs)}"
        )
    return Metadata(
        tuple(_tensor(name, of) for name, of in zip(inputs, parameters, strict=True)),
        tuple(_tensor(name, of) for name, of in zip(outputs, results, strict=True)),
        dict(target),
        compiled_by(),
        device,
        network,
        plan,
    )


def compiled_by() -> dict[str, str]:
    """Versions of what makes a library; rankc is "checkout" where it is not installed."""
    found = {"rankc": "checkout"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def attach(module: Any, metadata: Metadata) -> Any:
    """The Relax module with ``metadata`` as one more external module: a C++ source of a constant and a function.

    ``export_library`` compiles it with whatever links the library (a cross-compiler too), which must know C++; it
    includes no header.
    """
    import tvm

    source = tvm.get_global_func("runtime.CSourceModuleCreate")(c_source(metadata.to_json()), "cc", [SYMBOL], [])
    others = list(module.attrs["external_mods"]) if module.attrs and "external_mods" in module.attrs else []
    return module.with_attr("external_mods", [*others, source])


def c_source(text: str) -> str:
    """C++ of the constant, in a section of its own that the linker keeps apart, and of a function that returns it.

    The function is TVM's way to read it: the library's function "rankc_metadata" takes nothing and returns a string.
    """
    literal = text.replace("\\", "\\\\").replace('"', '\\"')
    return _SOURCE.replace("@SECTION@", SECTION).replace("@NAME@", SYMBOL).replace("@TEXT@", literal)


# Types and names are those of tvm/ffi/c_api.h, whose path a cross-compiler would have to be told.
_SOURCE = """
#include <stddef.h>
#include <stdint.h>

#if defined(__ELF__)
#define IN_ITS_SECTION __attribute__((used, section("@SECTION@")))
#else
#define IN_ITS_SECTION
#endif

extern "C" {

extern const char @NAME@[];
const char @NAME@[] IN_ITS_SECTION = "@TEXT@";

struct Bytes {
  const char* data;
  size_t size;
};
int TVMFFIStringFromByteArray(const Bytes* text, void* result);

int __tvm_ffi_@NAME@(void*, const void*, int32_t, void* result) {
  const Bytes text = {@NAME@, sizeof(@NAME@) - 1};
  return TVMFFIStringFromByteArray(&text, result);
}
}
"""


def _tensor(name: str, of: Any) -> TensorInfo:
    shape = [] if of.shape is None else list(of.shape)
    return TensorInfo(
        name, str(of.dtype), tuple(int(dim.value) if hasattr(dim, "value") else _name(dim) for dim in shape)
    )


def _name(dim: Any) -> str:
    """A symbolic size as people write it: ``batch``, ``batch * 2``."""
    return _NUMBER.sub(r"\1", str(dim))
