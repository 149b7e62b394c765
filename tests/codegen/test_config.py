from pathlib import Path

import pytest

from codegen.budget import Budget
from codegen.config import LowerConfig
from codegen.toml_text import dumps
from passes.errors import InputError, UsageError


def full(folder: Path) -> LowerConfig:
    """Every option away from its default."""
    return LowerConfig.from_values(
        {
            "model": folder / 'odd "name" \\ é\x7f.onnx',
            "target": f"{folder}/chip.toml:rows=32",
            "budgets": {"latency": "60%", "size": "1.2MiB"},
            "max_error": 0.01,
            "calib": f"{folder}/load.py:calibration",
            "eval": "/elsewhere/test.npz",
            "train": f"{folder / 'load.py'}:train",
            "epochs": 7,
            "batch": 32,
            "lr": 0.02,
            "augment": "crop_flip",
            "label_smoothing": 0.1,
            "held_out": 0.2,
            "device": "cpu",
            "train_processes": 2,
            "samples": None,
            "shapes": {"a.b": (1, 3, 8, 8), "x": (2,)},
            "include": ("layer*",),
            "exclude": ("head", "stem"),
            "formats": ("svd", "tucker2"),
            "plan": folder / "plan.json",
            "solver": "greedy",
            "effort": "quick",
            "time_budget_s": 90.0,
            "seed": 7,
            "margin": 0.02,
            "database": folder / "tune.jsonl",
            "trials": 3,
            "rpc": "127.0.0.1:9190",
            "rpc_key": "lab",
            "output": folder / "out",
            "dump_ir": folder / "ir",
            "explain": True,
        }
    )


def test_every_option_survives_the_file(tmp_path: Path) -> None:
    config = full(tmp_path)
    assert {n for n in LowerConfig.model_fields if getattr(config, n) == LowerConfig(model="m").__dict__[n]} == {
        "force",
        "resume",
        "dry_run",
    }, "an option at its default is not tested"
    path = tmp_path / "out" / "config.toml"
    path.parent.mkdir()
    path.write_text(config.to_toml(path.parent), encoding="utf-8")
    assert LowerConfig.from_toml(path) == config


def test_defaults_survive_the_file(tmp_path: Path) -> None:
    config = LowerConfig(model=tmp_path / "m.onnx").resolved(tmp_path)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(tmp_path), encoding="utf-8")
    assert LowerConfig.from_toml(path) == config


def test_a_project_folder_can_be_moved(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "out").mkdir(parents=True)
    (old / "out" / "config.toml").write_text(full(old).to_toml(old / "out"), encoding="utf-8")
    old.rename(new)
    moved = LowerConfig.from_toml(new / "out" / "config.toml")
    assert moved == full(new)
    assert moved.eval == "/elsewhere/test.npz"


def test_force_and_resume_are_never_saved(tmp_path: Path) -> None:
    text = LowerConfig(model="m.onnx", force=True, dry_run=True).to_toml(tmp_path)
    assert not {"force", "resume", "dry_run"} & {line.split(" = ")[0] for line in text.splitlines()}


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('model = "m.onnx"\nseed = 3\n[budgets]\nlatency = "60%"\n')
    config = LowerConfig.from_toml(path, {"seed": 4, "output": tmp_path / "o"})
    assert (config.seed, config.output, config.model) == (4, tmp_path / "o", tmp_path / "m.onnx")
    assert config.parsed_budgets == (Budget("latency", 0.6, "", True),)


def test_run_options_leave_out_what_cannot_change_the_result(tmp_path: Path) -> None:
    config = full(tmp_path)
    same = config.model_copy(update={"output": None, "resume": True, "dump_ir": None, "explain": False})
    assert same.run_options() == config.run_options()
    assert config.model_copy(update={"seed": 8}).run_options() != config.run_options()


def test_input_files_name_what_else_is_read(tmp_path: Path) -> None:
    assert full(tmp_path).input_files() == {
        "calib": tmp_path / "load.py",
        "eval": Path("/elsewhere/test.npz"),
        "train": tmp_path / "load.py",
        "plan": tmp_path / "plan.json",
        "target": tmp_path / "chip.toml",
    }


INTEGER = "options: seed = 'x': input should be a valid integer, unable to parse string as an integer"
POSITIVE = "input should be greater than or equal to 1"
LATENCY = "write 60%, 2.5ms, 300us or 120000cycles"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "options: 'model' is missing"),
        ({"model": "m", "max_error": 0}, "options: max_error = '0': input should be greater than 0"),
        ({"model": "m", "seed": "x"}, INTEGER),
        ({"model": "m", "shapes": {"x": [1, 0]}}, "options: shapes.x.1 = '0': " + POSITIVE),
        ({"model": "m", "effort": "max"}, "options: effort = 'max': input should be 'quick', 'default' or 'extensive'"),
        ({"model": "m", "force": True, "resume": True}, "--force starts over and --resume goes on: give one of them"),
        ({"model": "m", "budgets": {"latency": "6"}}, "--latency '6' has no unit; " + LATENCY),
    ],
)
def test_a_wrong_option_is_one_line(values: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        LowerConfig.from_values(values)
    assert str(caught.value) == line


def test_an_unknown_option_names_the_file_and_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('model = "m.onnx"\ntargt = "asic"\n')
    with pytest.raises(UsageError) as caught:
        LowerConfig.from_toml(path)
    assert str(caught.value).startswith(f"{path}: there is no option 'targt'; options: model, target, budgets,")


def test_a_broken_or_missing_file_is_unusable_input(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with pytest.raises(InputError) as caught:
        LowerConfig.from_toml(path)
    assert str(caught.value) == f"{path}: cannot be read as a configuration: No such file or directory"
    path.write_text("model = [")
    with pytest.raises(InputError, match="cannot be read as a configuration: "):
        LowerConfig.from_toml(path)


def test_values_without_a_toml_form_are_refused() -> None:
    with pytest.raises(TypeError, match="a complex has no place in a configuration file"):
        dumps({"z": 1j})


def test_a_device_is_for_whatever_trains() -> None:
    """A solver that looks at the network trains on calibration data too."""
    assert LowerConfig(model=Path("m"), solver="haloc", device="cpu").device == "cpu"
    assert LowerConfig(model=Path("m"), train="t.npz", device="cpu").device == "cpu"
    with pytest.raises(UsageError, match="--device is for training: give --train data"):
        LowerConfig(model=Path("m"), solver="milp", device="cpu")
    with pytest.raises(UsageError, match="--epochs is for training: give --train data"):
        LowerConfig(model=Path("m"), solver="haloc", device="cpu", epochs=3)
