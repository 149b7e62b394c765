"""What an operation of an integer network reads and writes."""

from __future__ import annotations

from codegen.quantized.graph import QHost, QMove, QOperation, QProduct, QSum


def reads(operation: QOperation) -> tuple[str, ...]:
    """The tensors that ``operation`` reads, each once."""
    if isinstance(operation, QHost):
        return tuple(dict.fromkeys(operation.inputs))
    if isinstance(operation, QSum | QProduct):
        return tuple(dict.fromkeys((operation.a, operation.b)))
    if isinstance(operation, QMove):
        return tuple(dict.fromkeys(piece.input for piece in operation.pieces))
    return (operation.input,)


def writes(operation: QOperation) -> tuple[str, ...]:
    """The tensors that ``operation`` writes."""
    return operation.outputs if isinstance(operation, QHost) else (operation.output,)
