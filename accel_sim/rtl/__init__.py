"""The array and the tile pipeline in SystemVerilog, and their co-simulation: the proof of the closed forms."""
