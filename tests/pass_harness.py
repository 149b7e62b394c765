"""The one harness that every pass test goes through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from passes.core.reference import relative_l2
from passes.graph import Graph
from passes.manager import Pass, PassManager, PassResult


def op_counts(graph: Graph) -> dict[str, int]:
    return dict(Counter(op.op for op in graph.workload()))


def check_pass(
    step: Pass,
    graph: Graph,
    feeds: Mapping[str, Any],
    *,
    before: dict[str, int],
    after: dict[str, int],
    tolerance: float,
) -> PassResult:
    """Runs ``step`` once on ``graph`` and once more, with everything that has to hold for each pass.

    Operators before and after as given; outputs within ``tolerance`` (relative L2) of what they were, computed by the
    format's own runtime; valid and with the same inputs and outputs (the manager checks); the second run does nothing.
    """
    reference = graph.clone().run(feeds)
    assert op_counts(graph) == before
    ((_, result),) = PassManager([step]).run(graph).outcomes
    assert op_counts(graph) == after
    assert result.modified == (before != after)
    for found, expected in zip(graph.run(feeds), reference, strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert relative_l2(found, expected) <= tolerance
    text = graph.to_text()
    ((_, again),) = PassManager([step]).run(graph).outcomes
    assert not again.modified
    assert graph.to_text() == text
    return result
