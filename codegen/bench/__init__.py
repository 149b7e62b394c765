"""Benchmarks: each one file and one frozen dataclass whose fields are its options, registered by name."""

BUILTIN = {
    "ptq-resnet20": "codegen.bench.ptq_resnet20:PtqResnet20",
    "error-models": "codegen.bench.error_models:ErrorModels",
    "solver": "codegen.bench.solver:Solver",
    "solvers-haloc": "codegen.bench.solvers_haloc:SolversHaloc",
    "lower-time": "codegen.bench.lower_time:LowerTime",
    "asic-pricing": "codegen.bench.asic_pricing:AsicPricing",
    "asic-engine": "codegen.bench.asic_engine:AsicEngine",
    "engine-resnet50": "codegen.bench.engine_resnet50:EngineResnet50",
    "asic-vs-scalesim": "codegen.bench.asic_vs_scalesim:AsicVsScalesim",
    "flipped-bits": "codegen.bench.flipped_bits:FlippedBits",
    "cpu-resnet20": "codegen.bench.cpu_resnet20:CpuResnet20",
    "cpu-networks": "codegen.bench.cpu_networks:CpuNetworks",
    "cpu-prediction": "codegen.bench.cpu_prediction:CpuPrediction",
    "staircase": "codegen.bench.staircase:Staircase",
    "validation": "codegen.bench.validation:Validation",
}
"""Name -> "module:class". Here, because the command line names them in its help and imports nothing for it."""
