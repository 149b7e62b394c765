"""What a library says of itself, read off the file by our reader, by binutils, and by the loader."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import struct
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from codegen.runner.attach import c_source
from codegen.runner.build import installed
from codegen.runner.metadata import Metadata, TensorInfo, is_for_machine_of, read_metadata, read_section
from passes.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
PLAIN = Metadata(
    (TensorInfo("x", "float32", ("batch", 3)), TensorInfo('größe \\ "q"', "int64", ())),
    (TensorInfo("y", "float32", ("batch * 2", 4)),),
    {"kind": "llvm", "mcpu": "znver4", "num-cores": 2},
    {"rankc": "0.1", "apache-tvm": "1"},
    "a processor",
    "0" * 64,
    "1" * 64,
)


def test_metadata_survives_json() -> None:
    text = PLAIN.to_json()
    assert text.isascii() and "\n" not in text
    assert Metadata.from_json(text) == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"schema": 1}',
        PLAIN.to_json().replace('"schema": 1', '"schema": 2'),
        PLAIN.to_json().replace('"shape": []', '"shape": [1.5]'),
        PLAIN.to_json()[:-1],
    ],
)
def test_what_is_no_metadata_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^no metadata of a library: \w+"):
        Metadata.from_json(text)


def compiled(folder: Path, text: str, *options: str) -> Path:
    """A library of nothing but the constant."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    source, library = folder / "m.cc", folder / "m.so"
    source.write_text(c_source(text), encoding="utf-8")
    command = ["g++", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *options, str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def test_any_text_comes_back_from_the_file_and_from_the_loader(tmp_path: Path) -> None:
    library = compiled(tmp_path, PLAIN.to_json())
    assert read_metadata(library) == PLAIN
    ctypes.CDLL(str(installed().ffi), mode=ctypes.RTLD_GLOBAL)  # has what the library's function refers to
    loaded = ctypes.CDLL(str(library))
    address = ctypes.addressof(ctypes.c_char.in_dll(loaded, "rankc_metadata"))
    assert Metadata.from_json(ctypes.string_at(address).decode("ascii")) == PLAIN


def test_binutils_find_it_in_the_same_place(tmp_path: Path) -> None:
    if shutil.which("objcopy") is None:
        pytest.skip("no objcopy")
    library, section = compiled(tmp_path, PLAIN.to_json()), tmp_path / "section"
    subprocess.run(["objcopy", "-O", "binary", "--only-section=.rankc_metadata", library, section], check=True)
    assert read_section(library, ".rankc_metadata") == section.read_bytes()


def test_it_outlives_stripping(tmp_path: Path) -> None:
    library = compiled(tmp_path, PLAIN.to_json(), "-s")
    assert read_metadata(library) == PLAIN


def test_a_file_cut_anywhere_is_an_error_of_one_line(tmp_path: Path) -> None:
    data = compiled(tmp_path, PLAIN.to_json()).read_bytes()
    cut = tmp_path / "cut.so"
    for length in [0, 3, 16, 40, 63, *range(64, len(data), 997), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(InputError) as caught:
            read_metadata(cut)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(str(cut)), length


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_files_of_other_word_sizes_and_byte_orders(tmp_path: Path, wide: bool, order: str) -> None:
    """An ELF file of two sections, laid out here by the tables of the System V ABI."""
    names, content = b"\0.shstrtab\0.rankc_metadata\0", PLAIN.to_json().encode() + b"\0"
    header = 64 if wide else 52
    at = {"names": header, "content": header + len(names)}
    table = at["content"] + len(content)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    kind = struct.pack(f"{order}HHI", 3, 62, 1)
    word = "Q" if wide else "I"
    places = struct.pack(f"{order}{word * 3}", 0, 0, table)
    entry = 64 if wide else 40
    rest = struct.pack(f"{order}IHHHHHH", 0, header, 0, 0, entry, 3, 1)

    def section(name: int, offset: int, size: int) -> bytes:
        # sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link, sh_info, sh_addralign, sh_entsize
        return struct.pack(f"{order}II{word * 4}II{word * 2}", name, 1, 0, 0, offset, size, 0, 0, 1, 0)

    sections = section(0, 0, 0) + section(1, at["names"], len(names)) + section(11, at["content"], len(content))
    file = tmp_path / "made.so"
    file.write_bytes(ident + kind + places + rest + names + content + sections)
    assert read_metadata(file) == PLAIN
    assert read_section(file, ".text") is None


def test_the_machines_of_two_files_are_compared(tmp_path: Path) -> None:
    library = compiled(tmp_path, "{}")
    other = tmp_path / "other.so"
    data = bytearray(library.read_bytes())
    data[18:20] = struct.pack("<H", 243)  # RISC-V
    other.write_bytes(data)
    assert is_for_machine_of(library, library) and not is_for_machine_of(library, other)


def test_a_misfit_is_said_in_a_line() -> None:
    image, mask = TensorInfo("image", "float32", ("n", 3, 8)), TensorInfo("mask", "bool", ("n",))
    sizes: dict[str, int] = {}
    assert image.misfit("float32", (5, 3, 8), sizes) == "" and sizes == {"n": 5}
    assert mask.misfit("bool", (5,), sizes) == ""
    assert mask.misfit("bool", (4,), sizes) == "mask has shape [4], expected [n=5]"
    assert mask.misfit("bool", (), sizes) == "mask has shape [], expected [n=5]"
    assert image.misfit("float64", (5, 3, 8), {}) == "image has dtype float64, expected float32"
    assert image.misfit("float32", (5, 3, 9), {}) == "image has shape [5, 3, 9], expected [n, 3, 8]"
    assert replace(image, shape=("n", "n")).misfit("float32", (2, 3), {}) == "image has shape [2, 3], expected [n, n]"


def test_a_network_s_library_names_what_it_is(digits: Path) -> None:
    found = read_metadata(digits)
    assert [info.text for info in found.inputs] == ["image: float32[batch, 1, 16, 16]"]
    assert [info.text for info in found.outputs] == ["logits: float32[batch, 10]"]
    assert found.target["kind"] == "llvm"
    assert found.network == hashlib.sha256((ROOT / "examples" / "digits.onnx").read_bytes()).hexdigest()
    assert found.plan == "abc123"
    for package in ("apache-tvm", "apache-tvm-ffi"):
        assert found.versions[package] == version(package)
    assert json.loads(found.to_json())["schema"] == 1
