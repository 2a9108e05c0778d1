"""What a user mistypes is refused before Ray starts. Here Ray cannot start, which a command would report instead."""

import json
import shutil

import pytest
import ray
import torch
from safetensors.torch import save_file

from catsdogs import cli

NO_RAY = "expected a running cluster at RAY_ADDRESS=127.0.0.1:1"


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    ray.shutdown()  # of the session: the next test joins it again
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nothing listens there


@pytest.fixture
def work(tmp_path, red_blue_root, red_blue_checkpoint):
    """Make a folder with valid inputs of every command, and with invalid ones."""
    (tmp_path / "data").symlink_to(red_blue_root)
    (tmp_path / "model").symlink_to(red_blue_checkpoint)
    for folder in ("empty", "no classes", "runs/taken", "foreign"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(red_blue_root / "train" / "red" / "00.jpg", tmp_path / "no classes")
    for name in ("runs/taken/args.yaml", "foreign/part-00000.parquet", "damaged.pth"):
        (tmp_path / name).write_text("no such file")
    (tmp_path / "empty.txt").write_text("# no paths\n")
    (tmp_path / "list.txt").write_text("s3://bucket/1.jpg\n")
    (tmp_path / "labels.csv").write_text("file,label\n1.jpg,cats\n")
    config = json.loads((red_blue_checkpoint / "config.json").read_text())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config | {"calibration": {"temperature": 2}}))
    (tmp_path / "damaged" / "model.safetensors").symlink_to(red_blue_checkpoint / "model.safetensors")
    (tmp_path / "one class.csv").write_text("path,label\n1.jpg,cats\n2.jpg,dogs\n3.jpg,dogs\n")
    (tmp_path / "single.csv").write_text("path,label\n1.jpg,cats\n2.jpg,dogs\n")
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    shutil.copytree(red_blue_root / "validation", tmp_path / "other classes")
    (tmp_path / "other classes" / "red").rename(tmp_path / "other classes" / "green")
    return tmp_path


TRAIN = "train --storage-path WORK/runs --data-dir"
EVALUATE = "evaluate --output WORK/out --data-dir"
SCORE = "score --limit 1 --input"
AUDIT = "audit --output WORK/out"
REFUSED = {
    f"{TRAIN} WORK/absent": "no such file or folder",
    f"{TRAIN} WORK/empty": "no images under",
    f"{TRAIN} WORK/no~classes": "no class folders under",
    f"{TRAIN} WORK/data --weights none --name taken": "expected a new --name",
    f"{TRAIN} WORK/data --weights none --name new --resume": "nothing to resume",
    f"{TRAIN} WORK/data --weights WORK/absent.pth": "No such file",
    f"{TRAIN} WORK/data --weights WORK/damaged.pth": "is not a state dict",
    f"{TRAIN} WORK/data --weights WORK/other.safetensors": "expected the tensors of a ResNet50",
    f"{EVALUATE} WORK/empty --checkpoint WORK/model": "no images under",
    f"{EVALUATE} WORK/other~classes --checkpoint WORK/model": "the classes differ",
    f"{EVALUATE} WORK/data --checkpoint WORK/absent": "No such file",
    f"{SCORE} WORK/empty --checkpoint WORK/model --output WORK/out": "looked at 0 files",
    f"{SCORE} WORK/absent --checkpoint WORK/model --output WORK/out": "no such file or folder",
    f"{SCORE} WORK/data --checkpoint WORK/empty --output WORK/out": "No such file",
    f"{SCORE} WORK/data --checkpoint WORK/model --output WORK/foreign": "--output",
    AUDIT: "--input: expected one of --data-dir, --labels and --input, got none",
    f"{AUDIT} --data-dir WORK/data --input WORK/data": "expected one of --data-dir, --labels and --input, got --input",
    f"{AUDIT} --data-dir WORK/absent": "no such file or folder",
    f"{AUDIT} --data-dir WORK/empty": "no images under",
    f"{AUDIT} --data-dir WORK/no~classes": "for images without labels, use --input",
    f"{AUDIT} --input WORK/absent": "no such file or folder",
    f"{AUDIT} --input WORK/empty": "looked at 0 files, 0 images; expected names that end in",
    f"{AUDIT} --input WORK/list.txt": "if the list may name such files, add --allow-schemes s3",
    f"{AUDIT} --input WORK/data --group-by (x)": "--group-by needs --data-dir or --labels",
    f"{AUDIT} --data-dir WORK/data --group-by x": "--group-by: expected a capture in parentheses",
    f"{AUDIT} --input WORK/data --near 11": "--near: expected 0 to 10, got 11",
    f"{AUDIT} --input WORK/data --fail-on leaks,corrupt": "odd_size, odd_aspect_ratio, low_information, blurry, wrong_",
    f"{AUDIT} --input WORK/data --fail-on ,": "wrong_extension, suspect_label, separated by commas, got none",
    f"{AUDIT} --input WORK/data --against WORK/empty": "check --against",
    f"{AUDIT} --input WORK/data --against WORK/empty.txt": "no images under WORK/empty.txt: the list is empty",
    f"{AUDIT} --input WORK/data --against WORK/absent.csv": "absent.csv",
    f"{AUDIT} --input WORK/data --against WORK/labels.csv": "a column named path, file_name or image: there is none",
    f"{AUDIT} --labels WORK/data": "--labels WORK/data: expected a name that ends in .csv",
    f"{AUDIT} --labels WORK/labels.csv": "a column named path, file_name or image: there is none",
    f"{AUDIT} --labels WORK/out/files.parquet": "where the audit writes a new files.parquet; choose another --output",
    f"{AUDIT} --data-dir WORK/data --exclude WORK/out/exclude.csv": "--exclude WORK/out/exclude.csv: expected a table",
    f"{AUDIT} --input WORK/data --suspects WORK/model": "--suspects needs --data-dir or --labels",
    f"{AUDIT} --data-dir WORK/data --fail-on suspect_label": "--fail-on suspect_label needs --suspects",
    f"{AUDIT} --data-dir WORK/data --suspects WORK/empty": "expected a run with the folder best, or a checkpoint",
    f"{AUDIT} --labels WORK/one~class.csv --suspects WORK/model": "at least 2 images each, found only 'dogs'; omit",
    f"{AUDIT} --labels WORK/single.csv --suspects WORK/model": "at least 2 images each, found none; omit --suspects",
    "audit --input WORK/data --output WORK/damaged.pth": "expected a folder, found a file",
    f"{SCORE} WORK/data --checkpoint WORK/model --output WORK/out --min-precision 0.9": "expected a calibration in",
    f"{SCORE} WORK/data --checkpoint WORK/model --output WORK/out --min-precision 1": "--min-precision: expected",
    f"{EVALUATE} WORK/data --checkpoint WORK/model --min-precision 0.9": "found none; fit it on labelled images",
    f"{EVALUATE} WORK/data --checkpoint WORK/model --min-precision nan": "--min-precision: expected",
    f"{EVALUATE} WORK/data --checkpoint WORK/model --calibrate --min-precision 0.9": "--calibrate: expected no",
    f"{EVALUATE} WORK/data --checkpoint WORK/damaged --min-precision 0.9": "expected a calibration that catsdogs wrote",
    f"{EVALUATE} WORK/other~classes --checkpoint WORK/model --calibrate": "the classes differ",
    "demo --output WORK/foreign": "expected a new or empty local folder",
    "verify --output WORK/empty": "",
}
VALID = [
    f"{TRAIN} WORK/data --weights none --name new",
    f"{EVALUATE} WORK/data --checkpoint WORK/model",
    f"{EVALUATE} WORK/data --checkpoint WORK/damaged",
    f"{SCORE} WORK/data --checkpoint WORK/model --output WORK/out",
    f"{AUDIT} --data-dir WORK/data --against WORK/data/train --fail-on leakage,corrupt",
    f"{AUDIT} --data-dir WORK/data --suspects WORK/model --fail-on suspect_label",
]


def run(command, work) -> int:
    return cli.main([word.replace("~", " ").replace("WORK", str(work)) for word in command.split()])


@pytest.mark.parametrize("command", REFUSED)
def test_a_mistake_is_refused_before_ray_starts(work, capsys, command):
    assert run(command, work) == 2
    error = capsys.readouterr().err
    assert REFUSED[command].replace("WORK", str(work)) in error
    assert NO_RAY not in error


@pytest.mark.parametrize("command", VALID)
def test_a_valid_command_starts_ray(work, capsys, command):
    assert run(command, work) == 1
    assert NO_RAY in capsys.readouterr().err
