"""A systolic accelerator: its description, and what work costs on it. Imports NumPy and numba, nothing of rankc."""
