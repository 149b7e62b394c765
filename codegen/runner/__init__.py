"""What runs a compiled network: the library's description of itself, a runner in Python, and one in C++ (``cpp/``).

:mod:`codegen.runner.metadata` and :mod:`codegen.runner.library` need NumPy and TVM's runtime, and nothing else.
"""
