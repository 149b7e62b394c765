"""Constants in another shape or order of axes, folded by NumPy.

TVM's own pass compiles and runs a function for each of them, 30 ms for every bias. It is left with the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def with_views_folded(module: Any) -> Any:
    """``module`` with reshaped and transposed constants of ``main`` as constants. It is not changed itself."""
    import tvm
    from tvm import relax
    from tvm.ir import GenericConst
    from tvm.relax.expr_functor import PyExprMutator, mutator

    @mutator
    class Folder(PyExprMutator):  # type: ignore[misc]
        def visit_call_(self, call: Any) -> Any:
            call = self.visit_expr_post_order(call)
            name = getattr(call.op, "name", "")
            if name not in ("relax.reshape", "relax.permute_dims"):
                return call
            of = call.args[0]
            bound = self.lookup_binding(of) if isinstance(of, relax.Var) else None
            of = of if bound is None else bound
            if not isinstance(of, GenericConst):
                return call
            values = of.value.numpy()
            if name == "relax.reshape":
                values = values.reshape([int(size) for size in call.ty.shape.values])
            else:
                axes = call.attrs.axes
                values = values.transpose(None if axes is None else [int(axis) for axis in axes])
            return relax.const(np.array(values, order="C"), str(call.ty.dtype))

    folded = tvm.IRModule(module.functions, attrs=module.attrs)
    folded.update_func(module.get_global_var("main"), Folder(module).visit_expr(module["main"]))
    return folded
