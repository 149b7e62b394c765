"""The command line: ``rankc lower``, ``rankc simulate`` and ``rankc bench``, and the same under ``tools/``.

Results go to stdout, everything else to stderr. Nothing slow is imported before a command runs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from codegen.bench.command import bench
from codegen.cli_options import Debug, Quiet, Verbose, duration_s, json_target, not_both, shapes
from codegen.cli_reproduce import reproduce
from codegen.cli_run import run
from codegen.cli_simulate import simulate
from codegen.cli_streams import INTERRUPTED
from codegen.cli_train import train
from codegen.cli_tune import tune
from codegen.heap import collect_seldom, keep_freed_memory
from codegen.runner.command import run_library
from passes.errors import UsageError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Option = typer.Option


@app.callback()
def _commands() -> None:
    """A rank compiler: low-rank networks whose ranks the target's own latency chose."""


@app.command()
def lower(
    model: Annotated[
        Path | None,
        typer.Argument(help="Network to lower (.onnx or .pt2), or the config.toml of an earlier run."),
    ] = None,
    config: Annotated[Path | None, Option(help="Options from this config.toml; others given here win.")] = None,
    target: Annotated[
        str | None,
        Option(
            "--target",
            help="asic, asic:rows=32,sram_kib=256, my_chip.toml, cpu, cpu:threads=2, or cuda:gpu=h100. [asic]",
        ),
    ] = None,
    latency: Annotated[str | None, Option(help="Latency budget: 60%, 2.5ms, 120000cycles.")] = None,
    energy: Annotated[str | None, Option(help="Energy budget: 60%, 1.5mJ.")] = None,
    macs: Annotated[str | None, Option(help="Budget of multiply-adds: 60%, 40M.")] = None,
    params: Annotated[str | None, Option(help="Budget of parameters: 60%, 200k.")] = None,
    size: Annotated[str | None, Option(help="Budget of weight bytes: 60%, 1.2MiB.")] = None,
    max_error: Annotated[
        float | None, Option(help="Without budgets: largest relative error of the output. [0.05]")
    ] = None,
    calib: Annotated[
        str | None, Option(help="Calibration data: .npz, .npy, a folder of them, or script.py[:function].")
    ] = None,
    eval_: Annotated[str | None, Option("--eval", help="Evaluation data with labels, written the same way.")] = None,
    train: Annotated[
        str | None, Option(help="Training data, labels optional: the rewritten network is recovered on it.")
    ] = None,
    epochs: Annotated[int | None, Option(help="Epochs of recovery. [the effort's: 5, 20 or 100]")] = None,
    batch: Annotated[int | None, Option(help="Training samples a step. [64 or 128, by how many there are]")] = None,
    lr: Annotated[float | None, Option(help="Highest learning rate of recovery. [0.01 to 0.05, by the epochs]")] = None,
    augment: Annotated[
        str | None,
        Option(help="none, flip, crop_flip, or script: augment() of the training data's script. [its own, else none]"),
    ] = None,
    label_smoothing: Annotated[float | None, Option(help="Label smoothing of recovery. [0]")] = None,
    held_out: Annotated[
        float | None, Option(help="Share of the training data that the best weights are chosen by. [0.05]")
    ] = None,
    device: Annotated[str | None, Option(help="Where to train: auto, cpu, cuda or cuda:1. [auto]")] = None,
    train_processes: Annotated[
        int | None, Option(help="Processes of this machine that share the training. [1]")
    ] = None,
    include: Annotated[list[str] | None, Option(help="Only layers whose name matches this; repeatable.")] = None,
    exclude: Annotated[list[str] | None, Option(help="No layers whose name matches this; repeatable.")] = None,
    formats: Annotated[str | None, Option(help="Factor formats to consider: svd,tucker2,spatial_svd_vh. [all]")] = None,
    plan: Annotated[Path | None, Option(help="Replay this plan.json instead of searching.")] = None,
    solver: Annotated[str | None, Option(help="Rank solver. [milp]")] = None,
    effort: Annotated[str | None, Option(help="quick, default or extensive. [default]")] = None,
    time_budget: Annotated[
        str | None,
        Option(help="With budgets: try no further plan after 90s, 10m, 1h30m; the one at work is finished."),
    ] = None,
    seed: Annotated[int | None, Option(help="Seed of everything random. [0]")] = None,
    samples: Annotated[str | None, Option(help="Most calibration samples to use, or all. [1024]")] = None,
    shape: Annotated[
        list[str] | None, Option(help="Shape of an input with symbolic dimensions: x=1,3,224,224; repeatable.")
    ] = None,
    margin: Annotated[
        float | None, Option(help="Relative gain below which a chain is not worth it. [the target's]")
    ] = None,
    database: Annotated[
        Path | None, Option(help="Trials of a tuned target: read from this file and added to it. [the user's cache]")
    ] = None,
    trials: Annotated[
        int | None, Option(help="Schedules tried of each layer of a tuned target. [the effort's: 4, 8 or 32]")
    ] = None,
    rpc: Annotated[
        str | None, Option(help="Measure on a farm of devices: HOST:PORT of its tracker. It knows no password.")
    ] = None,
    rpc_key: Annotated[str | None, Option(help="The devices' key at the tracker.")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Folder for the result.")] = None,
    force: Annotated[bool, Option("--force", help="Replace the result in the output folder.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on with an interrupted run.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Only list every node: rewritable, kept or unsupported, and why.")
    ] = False,
    dump_ir: Annotated[Path | None, Option(help="Folder for the network's listing after each pass.")] = None,
    explain: Annotated[bool, Option("--explain", help="Show the reason of each choice.")] = False,
    json_: Annotated[
        str | None, Option("--json", help="Also write the report to this file; - prints it alone on stdout.")
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Lower a network: low-rank chains within the budgets, a verified model.onnx, its binary and a report."""
    budgets = {"latency": latency, "energy": energy, "macs": macs, "params": params, "size": size}

    def values() -> dict[str, Any]:
        given: dict[str, Any] = {
            "target": target,
            "budgets": {metric: text for metric, text in budgets.items() if text is not None} or None,
            "max_error": max_error,
            "calib": calib,
            "eval": eval_,
            "train": train,
            "epochs": epochs,
            "batch": batch,
            "lr": lr,
            "augment": augment,
            "label_smoothing": label_smoothing,
            "held_out": held_out,
            "device": device,
            "train_processes": train_processes,
            "include": tuple(include) if include else None,
            "exclude": tuple(exclude) if exclude else None,
            "formats": tuple(name.strip() for name in formats.split(",")) if formats else None,
            "plan": plan,
            "solver": solver,
            "effort": effort,
            "time_budget_s": None if time_budget is None else duration_s(time_budget),
            "seed": seed,
            "shapes": shapes(shape) if shape else None,
            "margin": margin,
            "database": database,
            "trials": trials,
            "rpc": rpc,
            "rpc_key": rpc_key,
            "output": output,
            "dump_ir": dump_ir,
            "force": force or None,
            "resume": resume or None,
            "dry_run": dry_run or None,
            "explain": explain or None,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if samples is not None:
            given["samples"] = None if samples == "all" else samples
        return given

    not_both(verbose, quiet)
    code = run(model, config, values, json_target(json_), verbose=verbose, quiet=quiet, debug=debug)
    raise typer.Exit(code)


app.command()(simulate)
app.command()(tune)
app.command()(train)
app.command("run")(run_library)
app.command()(bench)
app.command()(reproduce)


def main(arguments: Sequence[str] | None = None, *, checkout: Path | None = None) -> None:
    """Entry point of ``rankc``; ends the process with the exit code.

    ``checkout``: the folder that ``codegen``, ``passes`` and ``accel_sim`` must have been imported from.
    """
    sys.exit(_main(list(sys.argv[1:] if arguments is None else arguments), checkout))


def _main(arguments: list[str], checkout: Path | None) -> int:
    try:
        _check_origin(checkout)
        keep_freed_memory()
        collect_seldom()
        code = app(args=arguments, prog_name="rankc", standalone_mode=False)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        # Typer's errors of usage descend from click's, which it carries along under a private name.
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {' '.join(error.format_message().split())}; see --help", file=sys.stderr)
        return UsageError.exit_code
    return code if isinstance(code, int) else 0


def _check_origin(checkout: Path | None) -> None:
    """Another package of one of our names on the path would give a mixture of two programs."""
    found = {}
    for package in ("codegen", "passes", "accel_sim"):
        module = importlib.import_module(package)
        found[package] = Path(module.__file__ or next(iter(module.__path__))).resolve().parent
        if module.__file__ is None:
            raise UsageError(f"{package} at {found[package]} is no package of rankc; take it off PYTHONPATH")
    home = (checkout or found["codegen"].parent).resolve()
    for package, place in found.items():
        if place.parent != home:
            raise UsageError(f"{package} was imported from {place}, expected {home / package}; take it off PYTHONPATH")
