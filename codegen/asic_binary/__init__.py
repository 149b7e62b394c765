"""The accelerator's side of ``model.so``: programs as external functions, behind a C interface of a few functions."""
