"""Compiles quantized networks into programs for the accelerator: the price list's plan, as instructions."""
