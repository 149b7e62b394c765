"""The command ``rankc run model.so``: inputs from a file, outputs into one, and the time of a call."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from codegen.cli_options import Debug, Json, Quiet, json_target, shapes
from codegen.cli_streams import DONE, check_json_target, guarded, own_stdout, present
from passes.errors import UsageError

if TYPE_CHECKING:
    from codegen.runner.library import CallTimes
    from codegen.runner.metadata import Metadata

Option = typer.Option


def run_library(
    library: Annotated[Path, typer.Argument(help="Compiled network (model.so).")],
    inputs: Annotated[
        Path | None, Option(help=".npz with the inputs by name, or .npy for a network's one input. [random]")
    ] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Write the outputs to this .npz.")] = None,
    repeat: Annotated[int, Option(min=0, help="Time this many single calls.")] = 0,
    threads: Annotated[
        int, Option(min=0, help="Threads of TVM's pool, for code that was compiled for several. [as it is]")
    ] = 0,
    shape: Annotated[
        list[str] | None, Option(help="With random inputs: shape of one with symbolic dimensions; repeatable.")
    ] = None,
    seed: Annotated[int, Option(min=0, help="Seed of random inputs.")] = 0,
    metadata: Annotated[bool, Option("--metadata", help="Only say what the library holds; runs nothing.")] = False,
    json_: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a compiled network with TVM's runtime alone, the compiler left out."""

    def action() -> int:
        json_to = json_target(json_)
        check_json_target(json_to)
        if inputs is not None and shape:
            raise UsageError("--shape is for random inputs, and --inputs gives others")
        if output is not None and (output.suffix != ".npz" or not output.absolute().parent.is_dir()):
            raise UsageError(f"--output {output}: give a .npz in a folder that exists")
        with own_stdout(quiet) as stdout:
            if metadata:
                result = _described(library)
            else:
                result = _carried_out(library, inputs, output, repeat, threads, shapes(shape or []), seed)
            present(_text(result), partial(_show, result), stdout, json_to, quiet=quiet)
        return DONE

    raise typer.Exit(guarded(action, lambda: "nothing was written", debug=debug))


def _described(path: Path) -> dict[str, Any]:
    from codegen.runner.metadata import read_metadata

    return {"library": str(path), "metadata": _plain(read_metadata(path))}


def _carried_out(
    path: Path,
    inputs: Path | None,
    output: Path | None,
    repeat: int,
    threads: int,
    given: dict[str, tuple[int, ...]],
    seed: int,
) -> dict[str, Any]:
    from codegen.runner.inputs import random_inputs, read_inputs, write_outputs
    from codegen.runner.library import Library

    loaded = Library(path, threads=threads)
    arrays = random_inputs(loaded.metadata, given, seed) if inputs is None else read_inputs(inputs, loaded.metadata)
    made = loaded.run(arrays)
    if output is not None:
        write_outputs(output, made)
    times: CallTimes | None = loaded.time(arrays, repeat) if repeat else None
    return {
        "library": str(path),
        "metadata": _plain(loaded.metadata),
        "inputs": "random" if inputs is None else str(inputs),
        "outputs": {
            name: {
                "dtype": value.dtype.name,
                "shape": list(value.shape),
                "min": _finite(value.min()) if value.size else None,
                "max": _finite(value.max()) if value.size else None,
            }
            for name, value in made.items()
        },
        "written": None if output is None else str(output),
        "seconds": None if times is None else asdict(times),
    }


def _plain(metadata: Metadata) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(metadata.to_json())
    return values


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if abs(number) != float("inf") and number == number else None


def _text(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _show(result: dict[str, Any], stdout: TextIO) -> None:
    described = result["metadata"]
    target = described["target"]
    names = [str(target[key]) for key in ("kind", "mtriple", "mcpu", "arch") if key in target]
    versions = ", ".join(f"{package} {number}" for package, number in described["versions"].items())
    print(
        f"{result['library']}: for {described['device'] or 'any device of its target'} ({', '.join(names)})",
        file=stdout,
    )
    print(f"compiled by {versions}", file=stdout)
    for label, key in (("network", "network"), ("rank plan", "plan")):
        if described[key]:
            print(f"{label} sha256 {described[key]}", file=stdout)
    for role in ("inputs", "outputs"):
        for info in described[role]:
            sizes = ", ".join(map(str, info["shape"]))
            line = f"{role[:-1]} {info['name']}: {info['dtype']}[{sizes}]"
            made = result.get("outputs", {}).get(info["name"]) if role == "outputs" else None
            if made is not None:
                line += f" = [{', '.join(map(str, made['shape']))}]"
                if made["min"] is not None and made["max"] is not None:
                    line += f", values from {made['min']:.6g} to {made['max']:.6g}"
            print(line, file=stdout)
    if result.get("seconds"):
        times = result["seconds"]
        ms = [f"{name} {times[name] * 1e3:.4f} ms" for name in ("min", "p10", "median")]
        print(f"{times['calls']} calls, {result['inputs']} inputs: {', '.join(ms)}", file=stdout)
    if result.get("written"):
        print(f"written to {result['written']}", file=stdout)
