"""Networks on accelerators as they are, without compression: where the cycles, bytes and picojoules go."""
