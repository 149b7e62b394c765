"""The result of a training run as the dict that ``schema.json`` describes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from typing import Any

import jsonschema
import torch

from passes.core.site import Chain
from passes.graph import Note
from passes.training.devices import Group
from passes.training.factored import LayerScan, chain_macs, site_macs
from passes.training.progress import Run

SCHEMA_VERSION = 1


def layer_rows(layers: LayerScan, chains: Mapping[str, Chain], notes: Sequence[Note]) -> list[dict[str, Any]]:
    """A row per layer: the sites in the order in which they run, then what could not be factorized at all."""
    reasons = {note.node: note.reason for note in notes}
    rows = []
    for site in layers.sites:
        chain = chains.get(site.name)
        dense = site_macs(site)
        low = chain is not None and len(chain) > 1
        rows.append(
            {
                "name": site.name,
                "op": site.op,
                "choice": chain.format if low and chain is not None else "dense",
                "rank": list(chain.rank) if low and chain is not None else [],
                "macs_before": dense,
                "macs_after": dense if chain is None else chain_macs(site, chain),
                "reason": "" if low else reasons.get(site.name, ""),
            }
        )
    kept = [
        {"name": n.node, "op": n.op, "choice": "dense", "rank": [], "reason": n.reason}
        | {"macs_before": None, "macs_after": None}
        for n in layers.kept
    ]
    return [*rows, *kept]


def phase_row(name: str, options: dict[str, Any], facts: dict[str, Any], run: Run) -> dict[str, Any]:
    """A phase with its learning curve; epochs count from 1."""
    curve = [{**asdict(epoch), "number": epoch.number + 1} for epoch in run.epochs]
    return {
        "name": name,
        "options": options,
        "entered": facts,
        "epochs": curve,
        "best": run.best + 1,
        "held_out": run.held_out,
        "seconds": sum(epoch.seconds for epoch in run.epochs),
    }


def hardware(group: Group) -> dict[str, Any]:
    """What the run ran on."""
    gpu = group.device.type == "cuda"
    return {
        "device": str(group.device),
        "processor": torch.cuda.get_device_name(group.device) if gpu else _processor(),
        "threads": torch.get_num_threads(),
        "processes": group.size,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} processors"


@cache
def schema() -> dict[str, Any]:
    """The published schema of train.json."""
    text = resources.files("codegen.train").joinpath("schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def checked(report: dict[str, Any]) -> dict[str, Any]:
    """The report as plain JSON values; jsonschema.ValidationError where it is none."""
    plain: dict[str, Any] = json.loads(json.dumps(report, allow_nan=False))
    jsonschema.validate(plain, schema(), cls=jsonschema.Draft202012Validator)
    return plain


def to_json(report: dict[str, Any]) -> str:
    """The text of train.json."""
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
