"""The command ``rankc simulate MODEL``: options in, tables or one JSON object out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, TextIO

import typer

from codegen.cli_options import Debug, Json, Quiet, Verbose, json_target, not_both, shapes
from codegen.cli_streams import DONE, check_json_target, events, guarded, own_stdout, present, write
from passes.errors import UsageError

Option = typer.Option


def simulate(
    model: Annotated[Path, typer.Argument(help="Network (.onnx, of floats or QDQ int8) or program (program.bin).")],
    target: Annotated[
        list[str] | None,
        Option("--target", help="asic, asic:rows=32,sram_kib=256, a preset, my_chip.toml; repeatable. [asic]"),
    ] = None,
    shape: Annotated[
        list[str] | None, Option(help="Shape of an input with symbolic dimensions: x=1,3,224,224; repeatable.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        Option(help="rows=4,8,16 or rows+columns=8,16: the network on each such machine; twice for a grid."),
    ] = None,
    calib: Annotated[
        str | None,
        Option(help="Data for the ranges of a network of floats: .npz, .npy, a folder or script.py[:function]."),
    ] = None,
    inputs: Annotated[str | None, Option(help="Data to run with values, written the same way.")] = None,
    samples: Annotated[str | None, Option(help="Most samples to use of either, or all. [64]")] = None,
    price_list: Annotated[bool, Option("--price-list", help="Prices alone, without a program: faster.")] = False,
    layer_by_layer: Annotated[bool, Option("--layer-by-layer", help="Keep no map on chip between two layers.")] = False,
    stalls: Annotated[bool, Option("--stalls", help="Show the cycles of each queue by reason.")] = False,
    seed: Annotated[int, Option(min=0, help="Seed of random inputs.")] = 0,
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder for the report, its page, the program and its trace.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace the result in the output folder.")] = False,
    json_: Json = None,
    csv: Annotated[Path | None, Option("--csv", help="Also write the layers to this file.")] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Simulate a network as it is: cycles, stalls, DRAM bytes, energy and roofline by layer."""
    not_both(verbose, quiet)

    def action() -> int:
        from codegen.simulate.config import SimulateConfig
        from codegen.simulate.machine import parse_machine
        from codegen.simulate.output import check_folder, write_folder
        from codegen.simulate.report import to_csv, to_dict, to_json
        from codegen.simulate.sweep import parse_axes

        json_to = json_target(json_)
        check_json_target(json_to)
        if csv is not None and (csv.is_dir() or not csv.absolute().parent.is_dir()):
            raise UsageError(f"--csv {csv}: give a file in a folder that exists")
        config = SimulateConfig(
            model=model,
            machines=tuple(parse_machine(text) for text in target or ["asic"]),
            shapes=shapes(shape or []),
            calibration=calib,
            samples=_samples(samples),
            inputs=inputs,
            axes=parse_axes(sweep or []),
            price_list=price_list,
            layer_by_layer=layer_by_layer,
            seed=seed,
            output=output,
            force=force,
        )
        if output is not None:
            check_folder(output, force=force)
        with own_stdout(quiet) as stdout:
            from codegen.simulate.run import simulate as carry_out

            with events(verbose, quiet) as watcher:
                outcome = carry_out(config, watcher)
            report = to_dict(outcome, {}) if output is None else write_folder(outcome, output)
            show = partial(_show, report, stalls=stalls, output=output)
            present(to_json(report), show, stdout, json_to, quiet=quiet)
        write(csv, to_csv(report))
        return DONE

    raise typer.Exit(guarded(action, lambda: "nothing was written", debug=debug))


def _samples(text: str | None) -> int | None:
    if text == "all":
        return None
    if text is not None and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UsageError(f"--samples {text!r}: write a number above zero, or all")
    return 64 if text is None else int(text)


def _show(report: dict[str, object], stdout: TextIO, *, stalls: bool, output: Path | None) -> None:
    from codegen.simulate.console import print_simulation

    print_simulation(report, stdout, stalls=stalls)
    if output is not None:
        print(f"written to {output}", file=stdout)
