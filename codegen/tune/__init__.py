"""Tuned latencies: kernels as shapes, schedules as values, a database of trials, and the tuner that fills it.

Nothing here imports TVM. What compiles and measures stands in :mod:`codegen.tvm_kernels` and in processes of its own.
"""
