"""Networks no one here wrote: they read, come back from disk as they were, and survive exact chains everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from passes.core.reference import relative_l2
from passes.onnx_graph import OnnxGraph
from passes.onnx_surgery import Surgery
from tests.passes.onnx.exact import MODELS, inner, outer, run

if not MODELS.is_dir():
    pytest.skip("the folder ../shared/models is absent", allow_module_level=True)

EXPECTED = {  # sites, kept, affines: counted in the files by hand (convs, Gemms, MatMuls; LSTMs; QDQ weights)
    "dtln_2": (7, 0, 0),
    "fastestdet": (70, 0, 0),
    "resnet20_cifar10": (20, 0, 0),
    "resnet20_cifar10_qdq": (0, 20, 0),
    "resnet56_cifar10": (56, 0, 0),
    "silero_vad": (12, 4, 0),
    "squeezenet_v1.0_imagenet": (26, 0, 0),
    "ultraface_RFB-320": (52, 0, 35),
    "yunet_n_dynamic": (59, 0, 0),
}


def close(value: NDArray[Any], wanted: NDArray[Any]) -> bool:
    """Float32 rounding of up to 70 layers in sequence, where one alone stays below 1e-6; or a saturated sigmoid,
    whose values near 0 have no relative precision."""
    return relative_l2(value, wanted) < 1e-4 or float(np.abs(value - wanted).max()) < 1e-6


@pytest.mark.parametrize("name", EXPECTED)
def test_finds_every_layer(name: str) -> None:
    graph = OnnxGraph.read(MODELS / f"{name}.onnx")
    scan = graph.sites()
    assert (len(scan.sites), len(scan.kept), len(graph.affines())) == EXPECTED[name]
    assert len({site.name for site in scan.sites}) == len(scan.sites)


@pytest.mark.parametrize("name", EXPECTED)
def test_comes_back_from_disk_as_it_was(name: str, tmp_path: Path) -> None:
    source = onnx.load(MODELS / f"{name}.onnx")
    graph = OnnxGraph.read(MODELS / f"{name}.onnx")
    assert graph.save(tmp_path / "m.onnx") == (tmp_path / "m.onnx",)
    written = onnx.load(tmp_path / "m.onnx")
    for field in ("input", "output", "node", "name", "doc_string", "metadata_props", "quantization_annotation"):
        assert getattr(written.graph, field) == getattr(source.graph, field), field
    for field in ("ir_version", "producer_name", "producer_version", "opset_import", "metadata_props", "functions"):
        assert getattr(written, field) == getattr(source, field), field
    values = {t.name: numpy_helper.to_array(t) for t in written.graph.initializer}
    assert list(values) == [t.name for t in source.graph.initializer]
    for tensor in source.graph.initializer:
        np.testing.assert_array_equal(values[tensor.name], numpy_helper.to_array(tensor))
    feeds = graph.random_feeds(1)
    for value, reference in zip(run(written, feeds), run(source, feeds), strict=True):
        np.testing.assert_array_equal(value, reference)


@pytest.mark.parametrize("maker", [outer, inner])
@pytest.mark.parametrize("name", [name for name, (sites, _, _) in EXPECTED.items() if sites])
def test_survives_exact_chains_everywhere(name: str, maker: Any) -> None:
    graph = OnnxGraph.read(MODELS / f"{name}.onnx")
    feeds = graph.random_feeds(1)
    reference = graph.run(feeds)
    inputs, outputs = graph.inputs, graph.outputs
    for site in graph.sites().sites:
        graph.replace(site, maker(site.stage))
    graph.check()
    assert (graph.inputs, graph.outputs) == (inputs, outputs)
    assert len(graph.sites().sites) == 2 * EXPECTED[name][0]
    for value, wanted in zip(graph.run(feeds), reference, strict=True):
        assert close(value, wanted)


@pytest.mark.parametrize("name", EXPECTED)
def test_cleanup_and_folding_change_no_output(name: str) -> None:
    graph = OnnxGraph.read(MODELS / f"{name}.onnx")
    feeds = graph.random_feeds(1)
    reference = graph.run(feeds)
    sites = len(graph.sites().sites)
    for affine in graph.affines():
        graph.fold(affine, affine.site.stage.affine(affine.scale, affine.shift))
    graph.drop_identities()
    graph.drop_dead_code()
    graph.check()
    text = graph.to_text()
    assert graph.affines() == ()
    assert graph.drop_identities() == graph.drop_dead_code() == ()
    assert graph.to_text() == text
    assert len(graph.sites().sites) == sites
    for value, wanted in zip(graph.run(feeds), reference, strict=True):
        assert close(value, wanted)


@pytest.mark.parametrize("name", EXPECTED)
def test_workload_accounts_for_all_stored_numbers(name: str) -> None:
    graph = OnnxGraph.read(MODELS / f"{name}.onnx")
    graph.drop_dead_code()
    ops = graph.workload()
    stored = [numpy_helper.to_array(t) for t in graph.model().graph.initializer]

    def constants(nodes: Any) -> Any:
        for node in nodes:
            for attribute in node.attribute:
                yield from constants(attribute.g.node)
                if node.op_type == "Constant" and attribute.name == "value":
                    yield numpy_helper.to_array(attribute.t)

    stored += constants(graph.model().graph.node)
    assert sum(op.weight_bytes for op in ops) <= sum(a.nbytes for a in stored)
    weights = sum(a.size for a in stored if a.dtype.kind == "f")
    assert sum(op.weight_params for op in ops) >= weights
    assert all(len(op.input_shapes) == len(op.inputs) for op in ops)


def test_macs_of_resnet20_follow_from_its_architecture() -> None:
    graph = OnnxGraph.read(MODELS / "resnet20_cifar10.onnx")
    stem, head = 32 * 32 * 16 * 3 * 9, 64 * 10
    stages = [6 * 1024 * 16 * 16 * 9, 256 * 9 * (32 * 16 + 5 * 32 * 32), 64 * 9 * (64 * 32 + 5 * 64 * 64)]
    assert sum(op.stage.macs for op in graph.workload() if op.stage) == stem + sum(stages) + head


def test_shapes_bind_symbolic_dimensions_for_pricing_alone(tmp_path: Path) -> None:
    path = MODELS / "yunet_n_dynamic.onnx"
    graph = OnnxGraph.read(path)
    assert [note.reason for note in graph.notes][1] == (
        "dimension 'height' of input 'input' is symbolic: priced at 320; set it with --shape input=1,3,320,320"
    )
    bound = OnnxGraph.read(path, {"input": (1, 3, 64, 128)})
    assert bound.notes == ()
    assert bound.sites().sites[0].input_shape == (1, 3, 64, 128)
    macs = [sum(op.stage.macs for op in g.workload() if op.stage) for g in (graph, bound)]
    assert macs[0] * 64 * 128 == macs[1] * 320 * 320
    for site in bound.sites().sites:
        bound.replace(site, outer(site.stage))
    bound.save(tmp_path / "m.onnx")
    source = onnx.load(path)
    assert onnx.load(tmp_path / "m.onnx").graph.input == source.graph.input
    feeds = {"input": np.random.default_rng(0).standard_normal((2, 3, 96, 64)).astype(np.float32)}
    for value, wanted in zip(bound.run(feeds), run(source, feeds), strict=True):
        assert close(value, wanted)


def test_names_of_sites_in_bodies_show_the_path() -> None:
    sites = OnnxGraph.read(MODELS / "silero_vad.onnx").sites().sites
    assert all(site.in_body and ("/then_branch/" in site.name or "/else_branch/" in site.name) for site in sites)


def test_replacing_never_serialises_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = OnnxGraph.read(MODELS / "resnet56_cifar10.onnx")
    exports: list[Surgery] = []
    monkeypatch.setattr(Surgery, "export", lambda surgery, *args, **kwargs: exports.append(surgery))
    for site in graph.sites().sites:
        graph.replace(site, outer(site.stage))
    assert exports == []
