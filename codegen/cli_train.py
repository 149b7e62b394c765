"""The command ``rankc train``: options in, a trained network and its record out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codegen.cli_options import Debug, Quiet, Verbose, json_target, not_both
from codegen.cli_streams import DONE, INTERRUPTED, check_json_target, guarded, own_stdout, present
from passes.errors import UsageError

if TYPE_CHECKING:
    from codegen.events import Events
    from codegen.train.config import TrainConfig
    from codegen.train.run import OnEpoch

Option = typer.Option


def train(
    method: Annotated[
        str,
        Option(
            help="dense; elrt: Tucker-2 from the first step, factors kept orthogonal; svd: full-rank factors whose "
            "singular values are thinned out, pruned, fine-tuned."
        ),
    ],
    network: Annotated[
        str, Option(help="resnet20, resnet56, vgg16 (CIFAR), FILE.py:FUNCTION that returns an nn.Module, or an .onnx.")
    ],
    data: Annotated[
        str, Option("--train", help="Training data with labels: .npz, a folder of them, or script.py[:function].")
    ],
    output: Annotated[
        Path, Option("--output", "-o", help="Folder for model.onnx, model.pt, train.json, log.csv, config.json.")
    ],
    eval_: Annotated[
        str | None, Option("--eval", help="Test data with labels, written the same way; never used to choose.")
    ] = None,
    macs: Annotated[str | None, Option(help="Multiply-adds of the whole network at most: 50%, 20M.")] = None,
    ranks: Annotated[Path | None, Option(help="elrt: formats and ranks from this plan.json instead.")] = None,
    energy: Annotated[
        float | None, Option(help="svd: share of its energy that each layer may lose in pruning, instead of --macs.")
    ] = None,
    include: Annotated[
        list[str] | None, Option(help="Layers to factorize, by name; repeatable. [all but the first and the last]")
    ] = None,
    exclude: Annotated[list[str] | None, Option(help="No layers whose name matches this; repeatable.")] = None,
    epochs: Annotated[int | None, Option(help="Epochs; of svd, before pruning. [20]")] = None,
    batch: Annotated[int | None, Option(help="Samples a step, over all processes. [128]")] = None,
    optimizer: Annotated[str | None, Option(help="sgd, adam or adamw. [sgd]")] = None,
    lr: Annotated[float | None, Option(help="Peak learning rate. [0.1]")] = None,
    momentum: Annotated[float | None, Option(help="Nesterov momentum of sgd. [0.9]")] = None,
    weight_decay: Annotated[float | None, Option(help="Of weights; biases and BatchNorm have none. [0.0005]")] = None,
    warmup: Annotated[float | None, Option(help="Epochs of linear warm-up. [1]")] = None,
    schedule: Annotated[str | None, Option(help="cosine, or step: a tenth at each milestone. [cosine]")] = None,
    milestones: Annotated[str | None, Option(help="Fractions of the epochs, for step. [0.5,0.75]")] = None,
    label_smoothing: Annotated[float | None, Option(help="Share of each label spread over all classes. [0]")] = None,
    augment: Annotated[
        str | None,
        Option(help="none, flip, crop_flip, script (the loader script's augment()), or auto. [auto: script or none]"),
    ] = None,
    held_out: Annotated[
        float | None, Option(help="Share of the training data that the best epoch is chosen on. [0.05]")
    ] = None,
    clip_norm: Annotated[float | None, Option(help="Largest norm of a step's gradient. [none]")] = None,
    ema: Annotated[float | None, Option(help="Decay of a running mean of the weights, which is then kept. [0]")] = None,
    precision: Annotated[str | None, Option(help="fp32, bf16, or auto: bf16 where hardware has it. [auto]")] = None,
    compile_: Annotated[bool, Option("--compile", help="Train through torch.compile.")] = False,
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    seed: Annotated[int | None, Option(help="Seed of everything random. [0]")] = None,
    orthogonality: Annotated[float | None, Option(help="Weight of the orthogonality term. [elrt 0.001, svd 1]")] = None,
    layout: Annotated[
        str | None, Option(help="svd: channel (kxk, then 1x1) or spatial (kx1, then 1xk). [channel]")
    ] = None,
    sparsity: Annotated[float | None, Option(help="svd: weight of the sparsity term. [0.07]")] = None,
    measure: Annotated[str | None, Option(help="svd: sparsity as hoyer or l1. [hoyer]")] = None,
    decay: Annotated[
        str | None, Option(help="svd: the sparsity's weight: constant, or linear or cosine to zero. [constant]")
    ] = None,
    finetune_epochs: Annotated[int | None, Option(help="svd: epochs after pruning. [half of --epochs]")] = None,
    finetune_lr: Annotated[
        float | None, Option(help="svd: peak learning rate after pruning. [a tenth of --lr]")
    ] = None,
    input_: Annotated[
        list[str] | None, Option("--input", help="Names of the inputs in the order of the forward. [the data's]")
    ] = None,
    output_name: Annotated[list[str] | None, Option(help="Names of the outputs. [logits]")] = None,
    force: Annotated[bool, Option("--force", help="Replace the run in the output folder.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on with an interrupted run of the same options.")] = False,
    json_: Annotated[
        str | None, Option("--json", help="Also write train.json to this file; - prints it alone on stdout.")
    ] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a network from scratch: dense, or low-rank from the first step. Under torchrun processes share the work."""
    not_both(verbose, quiet)
    recipe = {
        "epochs": epochs,
        "batch": batch,
        "optimizer": optimizer,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "schedule": schedule,
        "milestones": None if milestones is None else _fractions(milestones),
        "label_smoothing": label_smoothing,
        "augment": augment or "auto",
        "held_out": held_out,
        "clip_norm": clip_norm,
        "ema": ema,
        "precision": precision,
        "compile": compile_,
        "seed": seed,
    }
    terms = {"layout": layout, "sparsity": sparsity, "measure": measure, "decay": decay}
    only: dict[str, dict[str, Any]] = {
        "elrt": {"ranks": ranks},
        "svd": {**terms, "energy": energy, "finetune-epochs": finetune_epochs, "finetune-lr": finetune_lr},
    }
    json_to = json_target(json_)
    leads = os.environ.get("RANK", "0") == "0"

    def action() -> int:
        from codegen.train.config import TrainConfig
        from passes.training.options import TrainingOptions
        from passes.training.svd_training import SvdOptions

        check_json_target(json_to)
        for owner, values in only.items():
            given = next((name for name, value in values.items() if value is not None), None)
            if given is not None and method != owner:
                raise UsageError(f"--{given} goes with --method {owner}")
        if orthogonality is not None and method == "dense":
            raise UsageError("--orthogonality goes with --method elrt or svd")
        if method == "svd":
            terms["orthogonality"] = orthogonality
        try:
            options = TrainingOptions(**_given(recipe))
            svd = SvdOptions(**_given(terms))
        except ValueError as error:
            raise UsageError(str(error)) from error
        config = TrainConfig(
            method=method,
            network=network,
            train=data,
            eval=eval_,
            output=output,
            macs=macs,
            ranks=ranks,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            inputs=tuple(input_ or ()),
            outputs=tuple(output_name or ()),
            options=options,
            svd=svd,
            energy=energy,
            finetune_epochs=finetune_epochs,
            finetune_lr=finetune_lr,
            device=device,
            force=force,
            resume=resume,
            **({} if orthogonality is None else {"orthogonality": orthogonality}),
        )
        try:
            return _train(config, json_to, verbose, quiet or not leads)
        except KeyboardInterrupt:
            if leads:
                raise
            return INTERRUPTED

    raise typer.Exit(guarded(action, lambda: _what_next(output), debug=debug))


def _train(config: TrainConfig, json_to: Path | None, verbose: bool, quiet: bool) -> int:
    from codegen.train.console import print_training
    from codegen.train.report import to_json
    from codegen.train.run import train as carry_out

    with own_stdout(quiet) as stdout:
        with _watching(verbose, quiet) as (watcher, on_epoch):
            report = carry_out(config, watcher, on_epoch)
        if report is not None:
            present(to_json(report), partial(print_training, report), stdout, json_to, quiet=quiet)
    return DONE


@contextmanager
def _watching(verbose: bool, quiet: bool) -> Iterator[tuple[Events, OnEpoch]]:
    from codegen.events import QuietEvents
    from codegen.train.console import TrainingConsole

    if quiet:
        yield QuietEvents(), lambda *_: None
    else:
        console = TrainingConsole(verbose=verbose)
        with console:
            yield console, console.epoch


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--milestones {text!r}: write fractions of the epochs, such as 0.5,0.75") from error


def _what_next(output: Path) -> str:
    from codegen.train.output import Output

    saved = Output(output).can_resume()
    return "the state is saved, --resume goes on from it" if saved else "nothing was trained yet"
