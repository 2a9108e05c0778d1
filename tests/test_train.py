"""train() on the session's Ray: what a run leaves, what it goes on from, what two workers share."""

import csv
import dataclasses
import os
import shutil
import signal

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import CLASSES, IMG_SIZE

from catsdogs import checkpoint
from catsdogs.config import TrainConfig
from catsdogs.errors import InputError
from catsdogs.progress import Message
from catsdogs.train import train

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config_for(root, folder, **settings):
    defaults = {
        "weights": "none",
        "epochs": 2,
        "batch_size": 8,
        "img_size": IMG_SIZE,
        "precision": "fp32",
        "seed": 3,
        "name": "run",
    }
    return TrainConfig(data_dir=str(root), storage_path=str(folder), **(defaults | settings))


def weights_of(folder):
    return checkpoint.load(str(folder)).model.state_dict()


@pytest.fixture(scope="module")
def finished(red_blue_root, tmp_path_factory, ray_cluster):
    """Train two epochs without a break."""
    folder = tmp_path_factory.mktemp("finished")
    lines = []
    config = config_for(red_blue_root, folder)
    result = train(config, lines.append)
    return config, folder / "run", lines, result


def test_a_run_leaves_what_the_contract_names(finished):
    _, run, _, result = finished
    assert {path.name for path in run.iterdir()} == {
        *("best", "last", "summary.csv", "args.yaml", "val_predictions.parquet", "report.html")
    }
    with (run / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == "epoch,train_loss,train_accuracy,val_loss,val_accuracy,lr,images_per_s,seconds".split(",")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    args = yaml.safe_load((run / "args.yaml").read_text())
    assert args["lr"] == pytest.approx(0.02 * 8 / 32)
    assert args["use_gpu"] == "false"
    assert result.best_epoch in (1, 2)
    assert checkpoint.load(str(run / "best")).class_names == CLASSES


def test_best_accuracy_is_that_of_its_predictions(finished):
    _, run, _, result = finished
    table = pq.read_table(run / "val_predictions.parquet")
    right = np.array(table["label"].to_pylist()) == np.array(table["true_label"].to_pylist())
    assert table.num_rows == 14
    assert right.mean() == result.val_accuracy


def test_every_epoch_is_a_line_with_its_numbers(finished):
    lines = [event.text for event in finished[2] if isinstance(event, Message)]
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 2
    for word in ("loss", "accuracy", "img/s", "ETA"):
        assert word in epochs[0]


def test_resumed_weights_equal_uninterrupted_ones(finished, red_blue_root, tmp_path):
    config, run, _, _ = finished
    first = dataclasses.replace(config, storage_path=str(tmp_path), epochs=2)
    with pytest.raises(InputError, match="exists"):
        train(config)
    _interrupt_after_first_epoch(first)
    lines = []
    train(dataclasses.replace(first, resume=True), lines.append)
    assert any("going on after epoch 1" in event.text for event in lines if isinstance(event, Message))
    expected, resumed = weights_of(run / "last"), weights_of(tmp_path / "run" / "last")
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0)


def _interrupt_after_first_epoch(config):
    def press_ctrl_c(event):
        if isinstance(event, Message) and event.text.startswith("epoch 1/"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, press_ctrl_c)


def test_resume_refuses_other_settings_with_the_difference(finished, red_blue_root):
    config, run, _, _ = finished
    with pytest.raises(InputError, match=r"--batch-size was 8, is 4"):
        train(dataclasses.replace(config, resume=True, batch_size=4))
    with pytest.raises(InputError, match="may only grow"):
        train(dataclasses.replace(config, resume=True, epochs=1))


def test_resume_of_nothing_is_refused(red_blue_root, tmp_path):
    with pytest.raises(InputError, match="nothing to resume"):
        train(config_for(red_blue_root, tmp_path, name="absent", resume=True))


def test_two_workers_end_where_one_does(red_blue_root, tmp_path):
    losses = []
    for num_workers, batch_size in ((1, 12), (2, 6)):
        config = config_for(
            red_blue_root,
            tmp_path / str(num_workers),
            num_workers=num_workers,
            batch_size=batch_size,
            freeze="backbone",
            augment="none",
            lr=0.05,
        )
        train(config)
        with (tmp_path / str(num_workers) / "run" / "summary.csv").open() as file:
            losses.append([(float(row["train_loss"]), float(row["val_loss"])) for row in csv.DictReader(file)])
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-3)


def test_killed_worker_restarts_the_group_and_bad_images_are_named(red_blue_root, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(red_blue_root, root)
    (root / "train" / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    lines = []

    def kill_once(event):
        lines.append(event)
        if isinstance(event, Message) and event.text.startswith("epoch 1/") and len(kills) == 0:
            kills.append(_kill_training_worker())

    kills = []
    train(config_for(root, tmp_path, epochs=3, num_workers=2, batch_size=4), kill_once)
    texts = [event.text for event in lines if isinstance(event, Message)]
    assert kills
    assert any("restarted after epoch" in text for text in texts)
    assert any("left out 1 training images" in text for text in texts)
    assert any("broken.jpg" in text for text in texts)
    with (tmp_path / "run" / "summary.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]


def _kill_training_worker():
    for process in psutil.process_iter(["cmdline"]):
        if any("RayTrainWorker" in word for word in process.info["cmdline"] or ()):
            os.kill(process.pid, signal.SIGKILL)
            return process.pid
    raise AssertionError("no training worker to kill")

