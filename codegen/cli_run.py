"""One ``lower`` as the command line sees it: options in, report out, exit code."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from codegen.cli_streams import DONE, MISSED, check_json_target, events, guarded, own_stdout, present, say
from passes.errors import UsageError

if TYPE_CHECKING:
    from codegen.config import LowerConfig
    from codegen.events import Events
    from codegen.result import InspectRow, LowerResult


def run(
    model: Path | None,
    config_path: Path | None,
    values: Callable[[], dict[str, Any]],
    json_to: Path | None,
    *,
    verbose: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Carries out one ``lower`` and returns its exit code; errors are one line on stderr."""
    config: LowerConfig | None = None

    def action() -> int:
        nonlocal config
        config = _config(model, config_path, values())
        check_json_target(json_to)
        with own_stdout(quiet) as stdout:
            carry_out = _inspect if config.dry_run else _lower
            return carry_out(config, stdout, json_to, verbose, quiet)

    return guarded(action, lambda: _what_next(config), debug=debug)


def _config(model: Path | None, config_path: Path | None, values: dict[str, Any]) -> LowerConfig:
    from codegen.config import COMMAND_LINE, LowerConfig

    if model is not None and model.suffix == ".toml" and config_path is None:
        model, config_path = None, model
    if model is not None:
        values["model"] = model
    if config_path is None:
        if model is None:
            raise UsageError("nothing to lower: give a network (.onnx, .pt2) or --config config.toml")
        config = LowerConfig.from_values(values, COMMAND_LINE).resolved(Path.cwd())
    else:
        # The model is a required option, so the values are checked and made absolute on a stand-in.
        partial = LowerConfig.from_values({"model": config_path, **values}, COMMAND_LINE).resolved(Path.cwd())
        config = LowerConfig.from_toml(config_path, {name: getattr(partial, name) for name in values})
    if config.output is None and not config.dry_run:
        raise UsageError("no output folder: give -o DIR")
    return config


def _lower(config: LowerConfig, stdout: TextIO, json_to: Path | None, verbose: bool, quiet: bool) -> int:
    from codegen.report.build import to_json
    from codegen.report.console import print_report

    with events(verbose, quiet) as watcher:
        result: LowerResult = _lowered(config, watcher)

    def show(stream: TextIO) -> None:
        print_report(result.report, explain=config.explain, stream=stream)
        if result.output is not None:
            print(f"written to {result.output}", file=stream)

    present(to_json(result.report), show, stdout, json_to, quiet=quiet)
    if not result.missed:
        return DONE
    if not quiet:
        say(f"missed: {'; '.join(_missed(result.report))}", debug=False)
    return MISSED


def _inspect(config: LowerConfig, stdout: TextIO, json_to: Path | None, verbose: bool, quiet: bool) -> int:
    from codegen.report.console import print_inspection

    with events(verbose, quiet) as watcher:
        rows = _inspected(config, watcher)
    text = json.dumps({"nodes": [asdict(row) for row in rows]}, indent=2, ensure_ascii=False) + "\n"
    present(text, lambda stream: print_inspection(rows, stream=stream), stdout, json_to, quiet=quiet)
    return DONE


def _missed(report: dict[str, Any]) -> Iterator[str]:
    from codegen.report.numbers import quantity

    for budget in report["budgets"]:
        if not budget["met"]:
            reached, limit = (quantity(budget[key], budget["unit"]) for key in ("value", "limit"))
            bound = budget["bound"]
            at_best = "" if bound is None else f", no plan reaches less than {quantity(bound, budget['unit'])}"
            yield f"{budget['metric']} is {reached}, the budget {limit}{at_best}"
    error = report["output_error"]
    if error["limit"] is not None and (error["relative_l2"] or 0) > error["limit"]:
        yield f"the output error is {error['relative_l2']:.3g}, the limit {error['limit']:.3g}"


def _driver() -> Any:
    """Imported on first use: it brings torch and onnxruntime, which take seconds."""
    import codegen.driver

    return codegen.driver


def _lowered(config: LowerConfig, watcher: Events) -> LowerResult:
    if config.model.suffix == ".pt2":
        from codegen.torch_models import lower_pt2

        return lower_pt2(config, watcher).result
    result: LowerResult = _driver().lower(config, watcher)
    return result


def _inspected(config: LowerConfig, watcher: Events) -> list[InspectRow]:
    if config.model.suffix == ".pt2":
        from codegen.torch_models import inspect_pt2

        with tempfile.TemporaryDirectory(prefix="rankc-") as folder:
            return inspect_pt2(config, watcher, Path(folder))
    rows: list[InspectRow] = _driver().inspect(config, watcher)
    return rows


def _what_next(config: LowerConfig | None) -> str:
    from codegen.workspace import can_resume

    if config is not None and config.output is not None and can_resume(config.output):
        return "the state is saved, --resume goes on from it"
    return "nothing was written"
