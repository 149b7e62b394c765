"""The staircase: what a low-rank chain costs by its rank, on two arrays, its maps on chip or through DRAM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accel_sim.pricing.layer import Layer, conv_layer
from accel_sim.pricing.price_list import PriceList
from accel_sim.spec_file import load_spec
from codegen.bench.benchmark import Table
from codegen.events import Events
from passes.errors import UsageError

PRESET = "edge_16x16"
ARRAYS = ((16, 16), (12, 14))
BYTES_PER_CYCLE = (16, 4)
_SHOWN = (8, 12, 14, 16, 17, 28, 32, 33, 48, 64, 65, 84, 85, 128, 192, 256)


def tucker_chain(channels: int, rank: int, size: int) -> tuple[Layer, ...]:
    """A 3x3 convolution of as many channels in as out, as 1x1, 3x3 at the rank, 1x1.

    Each with a bias, as int8 stages have: that is where their inputs' zero points go.
    """
    spatial = (size, size)
    return (
        conv_layer(channels, rank, spatial, (1, 1)),
        conv_layer(rank, rank, spatial, (3, 3), pads=(1,) * 4),
        conv_layer(rank, channels, spatial, (1, 1)),
    )


@dataclass(frozen=True)
class Staircase:
    """A 3x3 layer of ``channels`` to ``channels`` on a map of ``size`` x ``size``, every rank from 8 to ``channels``.

    ``output``: where the picture goes, its suffix naming the format; None draws none.
    """

    channels: int = 256
    size: int = 14
    output: Path | None = None

    name: ClassVar[str] = "staircase"

    def __post_init__(self) -> None:
        if self.output is not None and self.output.suffix not in (".svg", ".png"):
            raise UsageError(f"--output {self.output}: the picture is written as .svg or .png")

    def run(self, events: Events) -> dict[str, Any]:
        """Cycles and DRAM bytes by rank for each array and bandwidth; writes the picture."""
        ranks = range(8, self.channels + 1)
        chains = [tucker_chain(self.channels, rank, self.size) for rank in ranks]
        spatial = (self.size, self.size)
        dense = conv_layer(self.channels, self.channels, spatial, (3, 3), pads=(1,) * 4)
        panels = []
        for rate in BYTES_PER_CYCLE:
            for rows, columns in ARRAYS:
                with events.stage(f"{rows}x{columns}, {rate} B/cycle", None):
                    changes = {"rows": str(rows), "columns": str(columns), "bytes_per_cycle": str(rate)}
                    prices = PriceList(load_spec(PRESET, changes))
                    (whole,) = prices.layers([dense])
                    found = prices.chains(chains)
                    panels.append(
                        {
                            "array": [rows, columns],
                            "bytes_per_cycle": rate,
                            "dense_cycles": whole.cycles,
                            "dense_dram_bytes": whole.dram_bytes,
                            "ranks": list(ranks),
                            "macs_share": [sum(stage.macs for stage in chain) / dense.macs for chain in chains],
                            "layerwise_cycles": [price.layerwise_cycles for price in found],
                            "fused_cycles": [price.cycles for price in found],
                            "layerwise_dram_bytes": [price.layerwise_dram_bytes for price in found],
                            "fused_dram_bytes": [price.dram_bytes for price in found],
                        }
                    )
        if self.output is not None:
            with events.stage("picture", None):
                draw(panels, self.channels, self.size, self.output)
        return {"panels": panels, "kinds": {"cycles": "simulated"}}

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        tables = []
        for panel in result["panels"]:
            rows = []
            for i, rank in enumerate(panel["ranks"]):
                if rank in _SHOWN:
                    cells = [panel[key][i] for key in ("layerwise_cycles", "fused_cycles")]
                    speedups = [f"{panel['dense_cycles'] / cycles:.1f}x" for cycles in cells]
                    moved = [f"{panel[key][i]:,}" for key in ("layerwise_dram_bytes", "fused_dram_bytes")]
                    shown = [f"{cycles:,}" for cycles in cells]
                    rows.append((str(rank), f"{1 / panel['macs_share'][i]:.1f}x", *shown, *speedups, *moved))
            size = "x".join(map(str, panel["array"]))
            tables.append(
                Table(
                    f"{size}, {panel['bytes_per_cycle']} B/cycle: dense {panel['dense_cycles']:,} cycles, "
                    f"{panel['dense_dram_bytes']:,} bytes",
                    (
                        *("rank", "MACs", "cycles, layer by layer", "on chip", "speed-up", "on chip"),
                        *("DRAM bytes, layer by layer", "on chip"),
                    ),
                    tuple(rows),
                )
            )
        return tables


def _ticks(channels: int) -> list[int]:
    steps = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    return [rank for rank in steps if rank <= channels]


def draw(panels: list[dict[str, Any]], channels: int, size: int, path: Path) -> None:
    """A panel per array and bandwidth. UsageError where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise UsageError(f"--output needs matplotlib (pip install 'rankc[plots]'): {error}") from error

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "staircase", "font.size": 9, "path.simplify": True}
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(2, 2, figsize=(9.5, 7), sharex=True, sharey=True, layout="constrained")
        for axis, panel in zip(axes.flat, panels, strict=True):
            rows, columns = panel["array"]
            ideal = [panel["dense_cycles"] * share for share in panel["macs_share"]]
            axis.axhline(panel["dense_cycles"], color="0.45", linewidth=1, linestyle="--", label="dense layer")
            axis.plot(panel["ranks"], ideal, color="0.6", linewidth=1, linestyle=":", label="in proportion to MACs")
            axis.plot(panel["ranks"], panel["layerwise_cycles"], color="#c44e00", linewidth=1.2, label="layer by layer")
            axis.plot(panel["ranks"], panel["fused_cycles"], color="#0060a8", linewidth=1.2, label="maps on chip")
            axis.set_title(f"{rows}x{columns} array, {panel['bytes_per_cycle']} B/cycle", fontsize=9)
            # Logarithmic both ways: the same step in cycles is four fifths of the price at rank 16 and nothing at 256.
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlim(8, channels)
            lowest = min(p["fused_cycles"][0] for p in panels)
            axis.set_ylim(0.8 * lowest, 1.5 * max(p["layerwise_cycles"][-1] for p in panels))
            axis.set_xticks(_ticks(channels), labels=map(str, _ticks(channels)))
            axis.set_yticks([v for v in (1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6) if v >= lowest], minor=False)
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:,.0f}k"))
            axis.grid(color="0.9", linewidth=0.6)
            axis.set_axisbelow(True)
        for axis in axes[-1]:
            axis.set_xlabel("rank of the Tucker-2 chain")
        for axis in axes[:, 0]:
            axis.set_ylabel("cycles")
        axes[0, 0].legend(loc="upper left", frameon=False)
        figure.suptitle(
            f"3x3, {channels} to {channels} channels on {size}x{size}, int8, weight-stationary", fontsize=10
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
        pyplot.close(figure)
