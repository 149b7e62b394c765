"""``lower`` from Python: files, ONNX models, torch modules; what comes back and what stays behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from codegen import api, driver, torch_models
from codegen.api import Lowered, lower
from codegen.api_data import source_of
from codegen.config import LowerConfig
from codegen.dataset import load
from codegen.emission import Emission, EmissionRequest
from codegen.events import QuietEvents
from codegen.target import Target, parse_target
from codegen.torch_models import inspect_pt2, lower_pt2
from codegen.workspace import Workspace, can_resume
from passes import fx_rewritten
from passes.errors import InputError, UnsupportedError, UsageError, VerificationError
from passes.graph import TensorSpec
from passes.onnx_graph import OnnxGraph

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits.onnx"


def _no_binary(request: EmissionRequest) -> Emission:
    return Emission({"binary": None})


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def target(text: str) -> Target:
        return replace(parse_target(text), emit=_no_binary)

    monkeypatch.setattr(driver, "parse_target", target)


class Network(nn.Module):
    """Two convolutions with BatchNorm, of which one is behind a sum, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = torch.relu(self.norm(x + self.body(x)))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    made = Network()
    with torch.no_grad():
        for _ in range(3):
            made.train()(images())
    return made.eval()


def images(count: int = 48) -> Tensor:
    """Smooth random images: enough structure for a covariance that is far from the identity."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return noise + noise.roll(1, -1) + noise.roll(1, -2)


def run(path: Path, inputs: Tensor) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


def scores(result: Lowered, inputs: Tensor) -> NDArray[Any]:
    assert isinstance(result.model, nn.Module)
    with torch.no_grad():
        return np.asarray(result.model(inputs))


@pytest.fixture(scope="module")
def done(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lowered]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "parse_target", lambda text: replace(parse_target(text), emit=_no_binary))
        yield lower(
            network,
            "asic",
            example_inputs=images()[:1],
            macs="50%",
            calib=images(),
            effort="quick",
            output=tmp_path_factory.mktemp("api") / "out",
        )


def test_a_module_comes_back_as_a_module(network: Network, done: Lowered) -> None:
    assert done.folder is not None and isinstance(done.model, torch.fx.GraphModule) and not done.missed
    written = run(done.folder / "model.onnx", images())
    np.testing.assert_allclose(scores(done, images()), written, rtol=1e-4, atol=1e-5)
    assert done.report["result"]["macs"]["value"] <= 0.5 * done.report["baseline"]["macs"]["value"]
    layers = {layer["name"]: layer for layer in done.plan["layers"]}
    assert set(layers) == {"stem.0", "body", "head"}
    chosen = layers["body"]["choice"]
    assert chosen != "dense"
    assert f"body.{chosen}_0" in dict(done.model.named_modules()) and "norm" in dict(done.model.named_modules())
    assert all(p.requires_grad for p in done.model.parameters()) and not done.model.training


def test_the_folder_holds_what_the_run_can_be_repeated_with(done: Lowered, tmp_path: Path) -> None:
    assert done.folder is not None
    report = json.loads((done.folder / "report.json").read_text())
    assert report == done.report and json.loads((done.folder / "plan.json").read_text()) == done.plan
    for name in report["artifacts"].values():
        assert name is None or (done.folder / name).exists()
    assert [p.name for p in done.folder.parent.iterdir()] == [done.folder.name]  # nothing beside it
    config = LowerConfig.from_toml(done.folder / "config.toml", {"output": tmp_path / "again"})
    again = driver.lower(config, QuietEvents())
    assert again.report["result"] == report["result"]
    program = torch.export.load(done.folder / "model.pt2")
    with torch.no_grad():
        np.testing.assert_allclose(program.module()(images(5)), scores(done, images(5)), rtol=1e-5, atol=1e-6)


def test_without_an_output_nothing_stays(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    result = lower(network, example_inputs=images()[:1], plan=PLAN, effort="quick")
    assert result.folder is None and list(tmp_path.iterdir()) == []
    assert scores(result, images(3)).shape == (3, 5)


PLAN: dict[str, Any] = {
    "layers": [
        {"name": "stem.0", "choice": "dense", "rank": []},
        {"name": "body", "choice": "channel_svd_in", "rank": [6]},
        {"name": "head", "choice": "dense", "rank": []},
    ]
}


def test_a_plan_of_an_onnx_file_is_replayed_on_the_module(network: Network, tmp_path: Path) -> None:
    """The file as torch exports it has names of its own: /stem/stem.0/Conv and the like."""
    path = tmp_path / "network.onnx"
    torch.onnx.export(
        network,
        (images(2),),
        str(path),
        dynamo=False,
        opset_version=17,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        input_names=["image"],
        dynamic_axes={"image": {0: "batch"}},
    )
    first = lower(path, params="60%", effort="quick", output=tmp_path / "onnx")
    assert isinstance(first.model, OnnxGraph) and "/body/Conv" in {layer["name"] for layer in first.plan["layers"]}
    second = lower(network, example_inputs=images(1), plan=tmp_path / "onnx" / "plan.json", effort="quick")
    wanted = first.model.run({"image": images(4).numpy()})[0]
    np.testing.assert_allclose(scores(second, images(4)), wanted, rtol=1e-4, atol=1e-5)


def test_a_pt2_file_is_lowered_like_its_module(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "network.pt2"
    batch = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(network, (images(2),), dynamic_shapes=(batch,)), path)
    result = lower(path, plan=PLAN, effort="quick", output=tmp_path / "out")
    of_module = lower(network, example_inputs=images(1), plan=PLAN, effort="quick")
    np.testing.assert_allclose(scores(result, images(4)), scores(of_module, images(4)), rtol=1e-4, atol=1e-5)
    assert result.report["model"]["path"] == str(path)
    values = {"model": path, "plan": tmp_path / "out" / "plan.json", "output": tmp_path / "cli", "effort": "quick"}
    found = lower_pt2(LowerConfig.from_values(values), QuietEvents())
    assert found.result.report["result"] == result.report["result"]
    assert LowerConfig.from_toml(tmp_path / "cli" / "config.toml").model == path
    rows = {
        row.node: row.status for row in inspect_pt2(LowerConfig.from_values({"model": path}), QuietEvents(), tmp_path)
    }
    assert rows["body"] == "rewritable" and set(rows) == {"stem.0", "body", "head"}


def test_onnx_models_come_back_as_onnx(tmp_path: Path) -> None:
    model = onnx.load(DIGITS)
    before = model.SerializeToString()
    with pytest.warns(UserWarning, match="missed: latency"):
        result = lower(model, latency="1%", effort="quick", include=("*head*",))
    assert result.missed and isinstance(result.model, OnnxGraph) and model.SerializeToString() == before
    feeds = {"image": np.zeros((2, 1, 16, 16), np.float32)}
    assert result.model.run(feeds)[0].shape == (2, 10)


def test_what_was_handed_over_in_memory_is_what_the_run_is_repeated_with(tmp_path: Path) -> None:
    first = lower(DIGITS, params="60%", effort="quick")
    out = tmp_path / "out"
    done = lower(onnx.load(DIGITS), plan=first.plan, effort="quick", output=tmp_path / "x" / ".." / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    config = LowerConfig.from_toml(out / "config.toml", {"output": tmp_path / "again"})
    assert (config.model, config.plan) == (out / "data" / "source.onnx", out / "data" / "plan_given.json")
    assert config.plan is not None and json.loads(config.plan.read_text()) == first.plan
    assert json.loads((out / "report.json").read_text()) == done.report
    assert done.report["model"]["path"] == str(config.model) and done.report["artifacts"]["data"] == "data"
    again = driver.lower(config, QuietEvents())
    assert again.report["result"] == done.report["result"]
    replaced = lower(DIGITS, plan=first.plan, effort="quick", output=out, force=True)  # no foreign file in it
    assert replaced.report["result"] == done.report["result"]


def test_a_run_on_a_model_in_memory_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same call in another process, so the network is handed over anew."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(driver, "verify_written", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            lower(OnnxGraph.read(DIGITS), macs="60%", effort="quick", output=out)
    assert can_resume(out) and not out.exists()
    restored: list[bool] = []
    restore = Workspace.restore

    def counted(workspace: Workspace, name: str) -> Any:
        found = restore(workspace, name)
        restored.append(found is not None)
        return found

    monkeypatch.setattr(Workspace, "restore", counted)
    lower(OnnxGraph.read(DIGITS), macs="60%", effort="quick", output=out, resume=True)
    assert any(restored) and [p.name for p in tmp_path.iterdir()] == ["out"]


def _interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["rewritten", "save_program", "_published", "keep"])
def test_an_output_of_a_module_is_whole_or_not_there(
    step: str, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise VerificationError("made to fail")

    if step == "keep":
        monkeypatch.setattr(api, "_keep", fails)
    else:
        monkeypatch.setattr(fx_rewritten if step == "rewritten" else torch_models, step, fails)
    with pytest.raises(VerificationError, match="made to fail"):
        lower(network, example_inputs=images(1), plan=PLAN, calib=images(8), effort="quick", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_data_that_are_refused_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="calib: holds a str"):
        lower(onnx.load(DIGITS), calib=["x"], output=tmp_path / "out")
    with pytest.raises(InputError, match="plan: is no JSON"):
        lower(onnx.load(DIGITS), plan={"layers": np.zeros(2)}, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_calls_that_cannot_be_meant_are_refused(network: Network) -> None:
    with pytest.raises(UsageError, match="example_inputs are missing"):
        lower(network)
    with pytest.raises(UsageError, match="example_inputs are for torch modules"):
        lower(DIGITS, example_inputs=images(1))
    with pytest.raises(InputError, match="a network cannot be a dict"):
        lower({})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no option 'latencies'"):
        lower(DIGITS, latencies="60%")
    with pytest.raises(UnsupportedError, match="cannot be traced"):
        lower(Branching(), example_inputs=torch.zeros(1, 3))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


SPECS = (TensorSpec("image", "float32", (None, 3, 8, 8)),)
ROWS, CLASSES = images(6), torch.arange(6) % 5
FORMS: dict[str, Any] = {
    "dict": {"image": ROWS.numpy(), "labels": CLASSES.numpy()},
    "dict of tensors": {"image": ROWS, "labels": CLASSES},
    "tuple": (ROWS, CLASSES),
    "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ROWS, CLASSES), batch_size=4),
    "batches": [(ROWS[:4], CLASSES[:4]), (ROWS[4:], CLASSES[4:])],
    "batches by name": [{"image": ROWS[:1], "labels": CLASSES[:1]}, {"image": ROWS[1:], "labels": CLASSES[1:]}],
}


@pytest.mark.parametrize("form", FORMS)
def test_data_come_in_many_forms(form: str, tmp_path: Path) -> None:
    data = load(source_of(FORMS[form], ["image"], "eval", tmp_path), SPECS, None)
    assert data.labels is not None and len(data) == 6
    np.testing.assert_array_equal(data.feeds["image"], ROWS.numpy())
    np.testing.assert_array_equal(data.labels, CLASSES.numpy())


def test_bare_arrays_and_paths_are_data(tmp_path: Path) -> None:
    for index, data in enumerate((ROWS, ROWS.numpy(), [ROWS[:2], ROWS[2:]])):
        (tmp_path / str(index)).mkdir()
        found = load(source_of(data, ["image"], "calib", tmp_path / str(index)), SPECS, None)
        np.testing.assert_array_equal(found.feeds["image"], ROWS.numpy())
    assert source_of(Path("load.py:some"), ["image"], "calib", tmp_path) == "load.py:some"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (3, "calib: is a int; give a path"),
        ([], "calib: holds no samples"),
        ((ROWS, CLASSES, CLASSES), r"calib: holds 3 arrays, the network has 1 inputs \(image\)"),
        ([{"image": ROWS}, (ROWS, CLASSES)], "calib: its batches hold different inputs"),
        ({"image": np.array(["a"])}, "calib: holds an array of type <U1"),
        ([ROWS, CLASSES], r"calib: its batches do not fit together: 'image' comes in shapes \(6, 3, 8, 8\) and \(6,\)"),
        ([ROWS, ROWS[:, :, :4]], r"calib: its batches do not fit together: .* and \(6, 3, 4, 8\)"),
        ([np.float32(1), np.float32(2)], "calib: holds a float32"),
        ([np.zeros(()), np.zeros(())], r"calib: its batches do not fit together: 'image' comes in shapes \(\)"),
        ({"image": [[1.0], [1.0, 2.0]]}, "calib: holds what is no array: "),
        ({"image": ROWS.to_sparse()}, "calib: holds what is no array: "),
        (["x"], "calib: holds a str"),
    ],
)
def test_data_of_no_known_form_are_refused(data: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        source_of(data, ["image"], "calib", tmp_path)


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert code.count("lower(") >= 2
    path = [str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "lowered" / "model.pt2").exists()
