"""The command ``rankc tune``: options in, a table or one JSON object out; databases and devices for others too."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from codegen.cli_options import Debug, Json, Quiet, Verbose, duration_s, json_target, not_both, shapes
from codegen.cli_streams import DONE, check_json_target, events, guarded, own_stdout, present
from passes.errors import InputError, UsageError

if TYPE_CHECKING:
    from codegen.tune.run import TuneConfig

Option = typer.Option


def tune(
    models: Annotated[
        list[Path] | None, typer.Argument(metavar="[MODEL]...", help="Networks (.onnx) whose layers are tuned.")
    ] = None,
    target: Annotated[str, Option("--target", help="cpu, cpu:threads=2, cpu:mcpu=znver3.")] = "cpu",
    trials: Annotated[int, Option(min=1, help="Schedules of a kernel at most, those of earlier runs included.")] = 8,
    patience: Annotated[
        int | None, Option(min=1, help="Trials without a gain of 1 % that end a kernel's tuning. [half, at least 4]")
    ] = None,
    time_budget: Annotated[str | None, Option(help="Start no trial after 90s, 10m, 1h30m.")] = None,
    database: Annotated[
        Path | None, Option(help="File of trials: read, and added to. [rankc/tune.jsonl in the user's cache]")
    ] = None,
    space: Annotated[
        str,
        Option(help="templates; or of TVM's MetaSchedule: metaschedule (drawn at random) or evolutionary."),
    ] = "templates",
    shape: Annotated[
        list[str] | None, Option(help="Shape of an input with symbolic dimensions: x=1,3,224,224; repeatable.")
    ] = None,
    rpc: Annotated[str | None, Option(help="Measure on a farm of devices: HOST:PORT of its tracker.")] = None,
    rpc_key: Annotated[str | None, Option(help="The devices' key at the tracker, with --serve too. [cpu]")] = None,
    merge: Annotated[list[Path] | None, Option(help="Take over the trials of this database first; repeatable.")] = None,
    compact: Annotated[
        int | None, Option(min=1, help="In the end, keep so many of the fastest trials of each kernel.")
    ] = None,
    list_: Annotated[bool, Option("--list", help="Show what is in the database, and do nothing else.")] = False,
    serve: Annotated[bool, Option("--serve", help="Start a tracker and devices on this machine instead.")] = False,
    host: Annotated[
        str | None, Option(help="--serve: the address to listen on. It knows no password. [127.0.0.1]")
    ] = None,
    port: Annotated[int | None, Option(min=0, max=65535, help="--serve: the tracker's port. [9190 or next]")] = None,
    servers: Annotated[int | None, Option(min=1, help="--serve: how many devices. [1]")] = None,
    seed: Annotated[int, Option(min=0, help="Seed of everything random.")] = 0,
    json_: Json = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tune the kernels of networks: schedules are tried on the device, and kept in a database for every later run."""
    from codegen.tune.database import default_path

    not_both(verbose, quiet)
    path = database or default_path()

    def action() -> int:
        from codegen.tune.run import TuneConfig

        if serve:
            return _serve(target, host, port, servers, rpc, rpc_key, alone=not (models or list_ or merge or compact))
        for option, value in (("--host", host), ("--port", port), ("--servers", servers)):
            if value is not None:
                raise UsageError(f"{option} goes with --serve")
        json_to = json_target(json_)
        check_json_target(json_to)
        if list_:
            if models or merge or compact:
                raise UsageError("--list does nothing else: leave networks, --merge and --compact out")
            return _list(path, json_to, quiet)
        if not (models or merge or compact):
            raise UsageError("nothing to tune: give a network (.onnx), or --merge FILE, --compact N or --list")
        return _tune(
            TuneConfig(
                models=tuple(models or ()),
                database=path,
                target=target,
                shapes=shapes(shape or []),
                trials=trials,
                patience=patience,
                time_budget_s=None if time_budget is None else duration_s(time_budget),
                space=space,
                seed=seed,
                rpc=rpc,
                rpc_key=rpc_key,
                merge=tuple(merge or ()),
                compact=compact,
            ),
            json_to,
            verbose,
            quiet,
        )

    kept = f"every trial that was finished is in {path}"
    raise typer.Exit(guarded(action, lambda: "nothing was tuned" if serve or list_ else kept, debug=debug))


def _tune(config: TuneConfig, json_to: Path | None, verbose: bool, quiet: bool) -> int:
    from codegen.tune.console import print_tuning
    from codegen.tune.run import tune as carry_out

    with own_stdout(quiet) as stdout:
        with events(verbose, quiet) as watcher:
            report = carry_out(config, watcher)
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        present(text, partial(print_tuning, report), stdout, json_to, quiet=quiet)
    return DONE


def _list(path: Path, json_to: Path | None, quiet: bool) -> int:
    from codegen.tune.console import print_listing
    from codegen.tune.database import Database
    from codegen.tune.run import listing

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with own_stdout(quiet) as stdout:
        with events(False, quiet) as watcher:
            rows = listing(Database(path, warn=watcher.warning))
        text = json.dumps({"database": str(path), "kernels": rows}, indent=2, ensure_ascii=False) + "\n"
        present(text, partial(print_listing, rows), stdout, json_to, quiet=quiet)
    return DONE


def _serve(
    target: str,
    host: str | None,
    port: int | None,
    servers: int | None,
    rpc: str | None,
    rpc_key: str | None,
    *,
    alone: bool,
) -> int:
    import sys

    from codegen.farm.address import LOOPBACK, Address
    from codegen.farm.serve import serve
    from codegen.tune.run import tunable_device

    if not alone:
        raise UsageError("--serve does nothing else: leave networks, --list, --merge and --compact out")
    serve(
        say=lambda line: print(line, file=sys.stderr, flush=True),
        host=host or LOOPBACK,
        port=port,
        key=rpc_key or "cpu",
        servers=servers or 1,
        threads=tunable_device(target).threads,
        tracker=None if rpc is None else Address.parse(rpc),
    )
    return DONE
