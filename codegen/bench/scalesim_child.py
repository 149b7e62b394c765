"""Runs SCALE-Sim on one layer after another: for a Python of its own, which has numpy 1.26 and scalesim 3.0.0.

Each line on stdin is a request {"rows", "columns", "dataflow", "layer": [name, height, width, kernel height, kernel
width, channels, filters, stride]}, each line on stdout an answer {"cycles", "stall_cycles", "cpu_s"}; the first one
says which versions run. Imports nothing of rankc, which is not installed there.

What it works around, all in 3.0.0: configurations without a [layout] section are refused; numpy 2.4 ends a run in a
TypeError after the whole layer was simulated; topologies need their trailing comma.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

CONFIG = """[general]
run_name = run

[architecture_presets]
ArrayHeight: {rows}
ArrayWidth: {columns}
IfmapSramSzkB: 64
FilterSramSzkB: 64
OfmapSramSzkB: 64
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Bandwidth: 10
Dataflow: {dataflow}
MemoryBanks: 1
ReadRequestBuffer: 32
WriteRequestBuffer: 32

[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2

[sparsity]
SparsitySupport: false
SparseRep: ellpack_block
OptimizedMapping: false
BlockSize: 8
RandomNumberGeneratorSeed: 40

[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
"""

HEADER = "Layer name, IFMAP Height, IFMAP Width, Filter Height, Filter Width, Channels, Num Filter, Strides,\n"


def run(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    from scalesim.scale_sim import scalesim

    config, topology = folder / "run.cfg", folder / "layers.csv"
    config.write_text(CONFIG.format(**{key: request[key] for key in ("rows", "columns", "dataflow")}))
    topology.write_text(HEADER + ", ".join(map(str, request["layer"])) + ",\n")
    # Without custom layouts the layout file is read and not used: any file of rows will do.
    simulator = scalesim(
        save_disk_space=True, verbose=False, config=str(config), topology=str(topology), layout=str(topology)
    )
    begin = time.process_time()
    simulator.run_scale(top_path=str(folder / "out"))
    spent = time.process_time() - begin
    (report,) = (folder / "out").rglob("COMPUTE_REPORT.csv")
    with report.open(newline="") as file:
        (row,) = [{key.strip(): value for key, value in row.items() if key} for row in csv.DictReader(file)]
    return {
        "cycles": round(float(row["Total Cycles"])),
        "stall_cycles": round(float(row["Stall Cycles"])),
        "cpu_s": spent,
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # SCALE-Sim prints
    print(json.dumps({name: version(name) for name in ("scalesim", "numpy")}), file=answers, flush=True)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory(prefix="scalesim-") as folder:
            print(json.dumps(run(json.loads(line), Path(folder))), file=answers, flush=True)


if __name__ == "__main__":
    main()
