"""Kernels of TVM: layers as tensor expressions, templates that schedule them, rules that schedule the rest.

What imports TVM calls :func:`codegen.tvm_kernels.imports.load_tvm` first, inside functions.
"""
