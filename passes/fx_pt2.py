"""Opens a ``.pt2`` file, or says in one line why it cannot be used.

torch.export.load unpickles what it finds (sample inputs, constants, tensor subclasses) and evaluates expressions, so a
file can make it run anything. This reader takes the archive apart itself: a zip file of JSON and raw bytes.

    models/<name>.json                      the graph and its signature
    data/weights/<name>_weights_config.json where each weight lies: file, sizes, strides, offset, type
    data/weights/weight_<i>                 raw bytes, little-endian
    data/constants/...                      the same for constants
    data/sample_inputs/<name>.pt            a pickle; never opened

Pickled weights and constants are refused. What the graph may call is decided in :mod:`passes.fx_pt2_graph`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes.errors import InputError, RankcError, UnsupportedError, first_line
from passes.fx_pt2_graph import Program, build

SCHEMA = 8
"""The major version of the graph's schema that torch 2.7 to 2.13 write."""

_DTYPES = {
    **{1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16},
    **{7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16},
}
"""Schema's numbers of types."""

_EXPORT = "export it again with torch.export.save"


@dataclass(frozen=True)
class _Archive:
    """A zip file of stored records below one root folder."""

    path: Path
    file: zipfile.ZipFile
    root: str

    def has(self, name: str) -> bool:
        return f"{self.root}/{name}" in self.file.NameToInfo

    def bytes_of(self, name: str) -> bytes:
        if not self.has(name):
            raise InputError(f"{self.path} is incomplete: it has no '{name}'; {_EXPORT}")
        return self.file.read(f"{self.root}/{name}")

    def json_of(self, name: str) -> dict[str, Any]:
        found = json.loads(self.bytes_of(name))
        if not isinstance(found, dict):
            raise ValueError(f"'{name}' is no object")
        return found


def load(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Program:
    """The network in the file. ``shapes`` binds inputs with symbolic dimensions.

    Raises InputError with one line, UnsupportedError where the file holds something that cannot be carried.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the .pt2 file in it")
        with zipfile.ZipFile(path) as file:
            archive = _opened(path, file)
            model = _model_name(archive)
            program = archive.json_of(f"models/{model}.json")
            _check_version(path, program)
            weights = _tensors(archive, f"data/weights/{model}_weights_config.json", "data/weights")
            constants = _tensors(archive, f"data/constants/{model}_constants_config.json", "data/constants")
        return build(path, program, {**constants, **weights}, shapes)
    except RankcError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; give the path of a .pt2 file") from error
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is truncated, damaged or no .pt2 file; {_EXPORT}") from error
    except Exception as error:  # whatever a damaged file provokes
        first = first_line(error)
        raise InputError(f"{path} is damaged: {type(error).__name__}: {first}; {_EXPORT}") from error


def _opened(path: Path, file: zipfile.ZipFile) -> _Archive:
    infos = file.infolist()
    roots = {info.filename.partition("/")[0] for info in infos}
    size = path.stat().st_size
    # Records that overlap would unpack to more than the file holds.
    if any(i.compress_type != zipfile.ZIP_STORED for i in infos) or sum(i.file_size for i in infos) > size:
        raise InputError(f"{path} holds compressed records, which torch does not write; {_EXPORT}")
    if len(roots) != 1:
        raise InputError(f"{path} is no .pt2 file; {_EXPORT}")
    archive = _Archive(path, file, roots.pop())
    if archive.has("version") and archive.has("serialized_exported_program.json"):
        raise UnsupportedError(f"{path} was written by torch 2.6 or older; {_EXPORT}")
    if not archive.has("archive_format") or archive.bytes_of("archive_format") != b"pt2":
        raise InputError(f"{path} is no .pt2 file, as torch.export.save writes it; {_EXPORT}")
    if archive.has("byteorder") and archive.bytes_of("byteorder") != b"little":
        raise UnsupportedError(f"{path} was written on a big-endian machine; {_EXPORT}")
    return archive


def _model_name(archive: _Archive) -> str:
    prefix = f"{archive.root}/models/"
    found = [n[len(prefix) : -len(".json")] for n in archive.file.namelist() if n.startswith(prefix) and ".json" in n]
    if not found:
        raise UnsupportedError(f"{archive.path} holds no exported program, only compiled ones; {_EXPORT}")
    if len(found) > 1 and "model" not in found:
        raise UnsupportedError(f"{archive.path} holds several programs ({', '.join(sorted(found))}); expected one")
    return "model" if "model" in found else found[0]


def _check_version(path: Path, program: dict[str, Any]) -> None:
    major = program.get("schema_version", {}).get("major")
    if major != SCHEMA:
        raise UnsupportedError(f"{path} has schema version {major}; supported is {SCHEMA}: {_EXPORT} of torch 2.13")


def _tensors(archive: _Archive, config: str, folder: str) -> dict[str, torch.Tensor]:
    """The stored tensors by name. Those that share bytes share memory; those that are the same are one parameter."""
    storages: dict[str, bytearray] = {}
    same: dict[tuple[Any, ...], torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    if not archive.has(config):
        legacy = config.replace("_weights_config.json", ".pt").replace("_constants_config.json", ".pt")
        if archive.has(legacy):
            raise UnsupportedError(f"{archive.path} keeps its weights in a pickle, as torch 2.8 did; {_EXPORT}")
        raise InputError(f"{archive.path} is incomplete: it has no '{config}'; {_EXPORT}")
    for name, payload in archive.json_of(config)["config"].items():
        if payload["use_pickle"] or payload["tensor_meta"] is None:
            raise UnsupportedError(
                f"{archive.path}: '{name}' is stored as a pickle, which can run code when it is read; only plain "
                "tensors are supported: export the network without tensor subclasses and custom objects"
            )
        meta, record = payload["tensor_meta"], str(payload["path_name"])
        dtype = _DTYPES.get(meta["dtype"])
        if dtype is None or meta["layout"] != 7:
            raise UnsupportedError(f"{archive.path}: '{name}' is not a dense tensor of a supported type")
        sizes, strides = ([int(n["as_int"]) for n in meta[key]] for key in ("sizes", "strides"))
        offset = int(meta["storage_offset"]["as_int"])
        if record not in storages:
            storages[record] = bytearray(archive.bytes_of(f"{folder}/{record}"))
        key = (record, dtype, tuple(sizes), tuple(strides), offset)
        if key not in same:
            tensor = _view(storages[record], dtype, sizes, strides, offset)
            same[key] = nn.Parameter(tensor, requires_grad=False) if payload["is_param"] else tensor
        found[name] = same[key]
    return found


def _view(storage: bytearray, dtype: torch.dtype, sizes: list[int], strides: list[int], offset: int) -> torch.Tensor:
    """A tensor on raw bytes. ValueError where it reaches past them."""
    if len(sizes) != len(strides) or min([*sizes, *strides, offset]) < 0:
        raise ValueError("sizes and strides of a tensor do not fit together")
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    if (last + 1) * dtype.itemsize > len(storage):
        raise ValueError("a tensor reaches past its bytes")
    whole = torch.frombuffer(storage, dtype=dtype, count=len(storage) // dtype.itemsize)
    return torch.as_strided(whole, sizes, strides, offset)
