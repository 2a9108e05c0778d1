"""train() on the session's Ray: the files of a run, resuming, failures, several workers."""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import (
    CLASSES,
    LOOPBACK,
    call_once_exists,
    kill_training_worker,
    lines_of,
    list_training_workers,
    read_summary,
)
from workers import build_train_worker

from benchmarks.faults.proxy import Fault
from catsdogs import data, start, storage
from catsdogs.checkpoint import read_checkpoint
from catsdogs.config import EvaluateConfig, TrainConfig
from catsdogs.data import EpochPlan
from catsdogs.errors import CatsdogsError, InputError, RunError
from catsdogs.evaluate import evaluate
from catsdogs.images import Preprocessing
from catsdogs.labels import LabelSource, list_evaluation, list_training
from catsdogs.lease import Lease
from catsdogs.progress import Message, silent
from catsdogs.schema import read_table
from catsdogs.start import start_ray
from catsdogs.train import settings, train
from catsdogs.train.inputs import ImageInputs, list_validation_batches
from catsdogs.train.loop import train_step
from catsdogs.train.model import build_optimizer, compute_class_weights, compute_learning_rate, set_learning_rate
from catsdogs.train.report_page import write_report
from catsdogs.train.resume import load_saved_run
from catsdogs.train.run_folder import History, RunFolder
from catsdogs.train.worker import Ranks
from catsdogs.weights import load_state_dict_strictly


def test_a_run_has_the_files_and_columns_of_the_reference(finished_run):
    run = finished_run.folder
    names = {"best", "last", "summary.csv", "args.yaml", "val_predictions.parquet", "report.html"}
    assert {path.name for path in run.iterdir()} == names
    rows = read_summary(run)
    assert ",".join(rows[0]) == "epoch,train_loss,train_accuracy,val_loss,val_accuracy,lr,images_per_s,seconds"
    assert [row["epoch"] for row in rows] == ["1", "2"]
    args = yaml.safe_load((run / "args.yaml").read_text())
    assert args["lr"] == pytest.approx(0.02 * 8 / 32)
    assert args["use_gpu"] == "false"
    best = read_checkpoint(str(run / "best"))
    assert best.class_names == CLASSES
    assert (best.calibration["n"], best.calibration["model_sha256"]) == (14, best.sha256)
    assert any(line.startswith("calibration") for line in lines_of(finished_run.events))
    assert "Precision against share accepted" in (run / "report.html").read_text()


def test_the_report_shows_pictures_that_the_driver_did_not_decode(finished_run, monkeypatch):
    """The driver of a job may run on a head node with the permissions to launch machines."""
    monkeypatch.setattr("catsdogs.images.decode.sniff", None)  # decoding in this process would raise
    folder = finished_run.folder
    before = (folder / "report.html").read_text()
    start_ray()
    assert before.count("data:image/jpeg") >= 24
    train_files = list_training(LabelSource(finished_run.config.data_dir), 0.15).train
    with Lease(str(folder), silent, "training run", "--name") as lease:
        run = RunFolder(str(folder), CLASSES, Preprocessing(img_size=finished_run.config.img_size), lease)
        write_report(finished_run.config, run, load_saved_run(str(folder), True).history, train_files)
    assert (folder / "report.html").read_text().count("data:image/jpeg") == before.count("data:image/jpeg")


def test_the_first_line_names_the_classes_and_both_folders(finished_run, red_blue_root):
    lines = lines_of(finished_run.events)
    assert lines[0] == (
        f"2 classes, 'blue', 'red': 26 training images in {red_blue_root}/train, "
        f"14 validation images in {red_blue_root}/validation"
    )
    assert f"{finished_run.folder}: 1 x 8 = 8 images a step, learning rate 0.005" in lines[:3]


def test_every_epoch_is_reported_in_a_line(finished_run):
    epochs = [line for line in lines_of(finished_run.events) if line.startswith("epoch ")]
    assert len(epochs) == 2
    for word in ("loss", "accuracy", "img/s", "ETA"):
        assert word in epochs[0]


@pytest.mark.skipif(os.environ.get("CATSDOGS_STOCK_RAY", "0") != "0", reason="stock Ray has them")
def test_a_run_on_a_local_ray_starts_no_actors_that_serve_a_cluster(finished_run):
    assert finished_run.actors == {"TrainController", "RayTrainWorker", "SynchronizationActor", "_QueueActor"}


def test_the_controller_and_the_actors_of_ray_train_import_no_torch(finished_run):
    assert any("RayTrainWorker" in title for title in finished_run.with_torch)
    actors = ("TrainController", "SynchronizationActor", "_QueueActor")
    assert [title for title in finished_run.with_torch if any(actor in title for actor in actors)] == []


def test_evaluate_gives_the_predictions_and_the_accuracy_of_the_best_epoch(finished_run, tmp_path):
    config = EvaluateConfig(
        data_dir=finished_run.config.data_dir,
        checkpoint=str(finished_run.folder / "best"),
        output=str(tmp_path),
        precision="fp32",
    )
    metrics = evaluate(config)
    predictions = pq.read_table(finished_run.folder / "val_predictions.parquet")
    assert pq.read_table(tmp_path / "predictions.parquet").equals(predictions)
    correct = np.array(predictions["label"].to_pylist()) == np.array(predictions["true_label"].to_pylist())
    assert predictions.num_rows == metrics["n"] == 14
    assert metrics["accuracy"] == correct.mean() == finished_run.result.val_accuracy
    best = read_summary(finished_run.folder)[finished_run.result.best_epoch - 1]
    assert float(best["val_loss"]) == pytest.approx(metrics["log_loss"], rel=1e-5)


@pytest.mark.usefixtures("on_local_ray")
def test_an_interrupted_and_resumed_run_on_s3_equals_an_uninterrupted_run_on_disk(
    finished_run, red_blue_root, bucket, put, s3_proxy_if_any
):
    keys = {path: f"a data+set/{path.relative_to(red_blue_root)}" for path in sorted(red_blue_root.rglob("*.jpg"))}
    for path, key in keys.items():
        put(key, path.read_bytes())
    data_dir, run = f"s3://{bucket}/a data+set", f"s3://{bucket}/runs/run"
    config = dataclasses.replace(finished_run.config, data_dir=data_dir, storage_path=f"s3://{bucket}/runs")
    training = [key for key in keys.values() if "/train/" in key]
    if s3_proxy_if_any is not None:  # so that Ctrl-C comes before the second epoch ends
        s3_proxy_if_any.reset(Fault("slow", keys=training, after_images=len(keys)))
    with pytest.raises(KeyboardInterrupt):
        train(config, press_ctrl_c_after_first_epoch)
    if s3_proxy_if_any is not None:
        s3_proxy_if_any.reset()
    assert [row["epoch"] for row in remote_summary(run)] == ["1"]
    assert "_lease.json" not in storage.list_names(run)
    storage.write_bytes(f"{run}/_lease.json", stale_lease())
    events = []
    result = train(dataclasses.replace(config, resume=True), events.append)
    assert any("resuming after epoch 1" in line for line in lines_of(events))
    assert "_lease.json" not in storage.list_names(run)

    for on_disk, on_s3 in zip(read_summary(finished_run.folder), remote_summary(run), strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
            assert float(on_s3[name]) == pytest.approx(float(on_disk[name]), rel=1e-5), name
    state, resumed_state = (
        read_checkpoint(uri).load_state_dict() for uri in (f"{finished_run.folder}/last", f"{run}/last")
    )
    for name, tensor in state.items():
        torch.testing.assert_close(resumed_state[name], tensor, atol=1e-6, rtol=0)

    assert result.val_accuracy == finished_run.result.val_accuracy
    ours, theirs = (read_checkpoint(f"{uri}/best").calibration for uri in (run, str(finished_run.folder)))
    assert (ours["n"], ours["mistakes"]) == (theirs["n"], theirs["mistakes"])
    assert ours["log_loss"] == pytest.approx(theirs["log_loss"], abs=1e-4)
    actual = read_table(storage.read_bytes(f"{run}/val_predictions.parquet"))
    expected = pq.read_table(finished_run.folder / "val_predictions.parquet")
    names = [path.removeprefix(f"{data_dir}/") for path in actual["path"].to_pylist()]
    assert names == [path.removeprefix(f"{red_blue_root}/") for path in expected["path"].to_pylist()]
    assert actual["label"].equals(expected["label"])
    np.testing.assert_allclose(actual["prob"].to_numpy(), expected["prob"].to_numpy(), atol=1e-5)


def stale_lease():
    """Build the lease of a dead driver of this machine."""
    with tempfile.TemporaryDirectory() as folder, Lease(folder, silent, "training run", "--name"):
        record = json.loads(Path(folder, "_lease.json").read_text())
    return json.dumps(record | {"process_started": "1", "token": "dead"}).encode()


def remote_summary(run):
    return list(csv.DictReader(io.StringIO(storage.read_bytes(f"{run}/summary.csv").decode())))


def press_ctrl_c_after_first_epoch(event):
    if isinstance(event, Message) and event.text.startswith("epoch 1/"):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "content",
    [
        b"{: \xff",
        b"",
        b"[1]",
        b"epochs: two\nprecision: fp32",
        b"epochs: 2\nprecision: fp3",
        b"seed: 2020-99-99",
        b"[" * 2000,
    ],
    ids=lambda content: content[:20],
)
def test_a_damaged_args_yaml_is_an_error_with_its_path(finished_run, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"run/args\.yaml") as caught:
        train(dataclasses.replace(finished_run.config, storage_path=str(tmp_path), resume=True))
    assert "\n" not in str(caught.value)


def copy_run(finished_run, storage_path):
    """Copy a finished run as hard links; a test replaces files and does not write into them."""
    shutil.copytree(finished_run.folder, storage_path / "run", copy_function=os.link)
    return storage_path / "run"


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace_content(content):
    def write(path):
        path.unlink()
        path.write_bytes(content)

    return write


def edit_text(old, new):
    return lambda path: replace_content(path.read_text().replace(old, new, 1).encode())(path)


def zero_middle(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle - 32 : middle + 32] = bytes(64)
    replace_content(bytes(content))(path)


def drop_last_epoch(path):
    """Write the training state of an earlier version, without the last epoch."""
    state = torch.load(path, weights_only=True)
    path.unlink()
    torch.save({"history": state["history"][:-1], "model": state["model"], "optimizer": state["optimizer"]}, path)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("last/training_state.pt", remove, "last/training_state.pt is missing, but there is best, last, summary.csv"),
        ("last/training_state.pt", replace_content(b"PK"), "last/training_state.pt is damaged"),
        ("last", remove, "last/training_state.pt is missing, but there is best, summary.csv"),
        ("last/config.json", remove, "cannot read .*/last/config.json: No such file"),
        ("best", remove, "best/model.safetensors is damaged or of another run: .* found no file"),
        (
            "best/model.safetensors",
            replace_content(b"\x10" + bytes(40)),
            "best/model.safetensors is damaged or of another run",
        ),
        ("summary.csv", remove, "summary.csv is damaged or of another run: .* found no file"),
        ("summary.csv", edit_text("\n2,", "\n3,"), "summary.csv is damaged or of another run"),
        ("val_predictions.parquet", replace_content(b"PAR1"), "val_predictions.parquet is damaged"),
        ("val_predictions.parquet", zero_middle, "val_predictions.parquet is damaged"),
    ],
)
def test_resume_of_an_incomplete_run_is_an_error_and_writes_nothing(finished_run, tmp_path, name, damage, words):
    run = copy_run(finished_run, tmp_path)
    damage(run / name)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(
        InputError, match=f"cannot resume {run}: .*{words}.*; restore this file, or start a new run"
    ) as caught:
        train(dataclasses.replace(finished_run.config, storage_path=str(tmp_path), resume=True, epochs=3))
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_summary_may_be_one_save_ahead_of_the_training_state_of_an_earlier_version(finished_run, tmp_path):
    run = copy_run(finished_run, tmp_path)
    drop_last_epoch(run / "last" / "training_state.pt")  # as if the run was killed before the last file was written
    assert load_saved_run(str(run), saves_every_epoch=True).history.epoch == 1
    summary = (run / "summary.csv").read_text()
    replace_content(f"{summary}3{summary.splitlines()[2][1:]}\n".encode())(run / "summary.csv")
    with pytest.raises(InputError, match=r"are of different epochs or runs: expected the 1 epochs .* found 3 rows"):
        load_saved_run(str(run), saves_every_epoch=True)
    assert load_saved_run(str(run), saves_every_epoch=False).history.epoch == 1


def test_a_run_that_was_killed_before_its_first_epoch_was_saved_starts_anew(finished_run, tmp_path):
    run = copy_run(finished_run, tmp_path)
    (run / "last" / "training_state.pt").unlink()
    with Lease(str(run), silent, "training run", "--name") as lease:
        RunFolder(str(run), (), None, lease).write_state({"history": []})
    assert load_saved_run(str(run), saves_every_epoch=True).history.epoch == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "args.yaml").touch()
    assert load_saved_run(str(tmp_path / "other"), saves_every_epoch=True).history.epoch == 0


def test_one_of_several_runs_takes_a_folder(tmp_path):
    uri = str(tmp_path / "run")
    with ThreadPoolExecutor(4) as executor:
        futures = [executor.submit(settings.create_run, uri, {"seed": 0}) for _ in range(4)]
        errors = [future.exception() for future in futures]
    assert errors.count(None) == 1
    assert {type(error) for error in errors} == {type(None), InputError}


def test_a_folder_on_s3_is_taken_once_even_by_runs_with_the_same_settings(bucket):
    uri = f"s3://{bucket}/runs/run"
    settings.create_run(uri, {"seed": 0})
    with pytest.raises(InputError, match="was taken by another run"):
        settings.create_run(uri, {"seed": 0})
    assert yaml.safe_load(storage.read_bytes(f"{uri}/args.yaml")) == {"seed": 0}


def test_a_folder_that_another_run_takes_meanwhile_is_refused(finished_run, tmp_path):
    def on_event(event):
        if isinstance(event, Message) and "images a step" in event.text:
            settings.create_run(str(tmp_path / "run"), {"seed": 7})

    with pytest.raises(InputError, match=f"{tmp_path}/run was taken by another run .*: choose another --name"):
        train(dataclasses.replace(finished_run.config, storage_path=str(tmp_path)), on_event)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["args.yaml"]
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text()) == {"seed": 7}


def test_runs_without_a_name_that_start_at_once_have_different_names(finished_run):
    config = dataclasses.replace(finished_run.config, name=None)
    assert len({settings.resolve(config).name for _ in range(5)}) == 5


def test_an_existing_run_needs_resume(finished_run):
    with pytest.raises(InputError, match="exists: expected a new --name"):
        train(finished_run.config)


def test_resume_with_other_settings_is_an_error_with_the_difference(finished_run):
    with pytest.raises(InputError, match=r"--batch-size was 8, is 4"):
        train(dataclasses.replace(finished_run.config, resume=True, batch_size=4, lr=0.005))
    with pytest.raises(InputError, match="may only grow"):
        train(dataclasses.replace(finished_run.config, resume=True, epochs=1))


def test_a_resumed_run_has_the_batch_size_and_learning_rate_that_the_first_command_chose(finished_run):
    config = dataclasses.replace(finished_run.config, resume=True, batch_size=None)
    resumed = settings.restore_settings(settings.resolve(config), str(finished_run.folder))
    assert (resumed.batch_size, resumed.lr) == (8, 0.005)
    assert settings.resolve_step(resumed, True, 10**6).batch_size == 8


@pytest.mark.parametrize(
    ("num_images", "num_workers", "expected"),
    [
        (10**6, 1, 256),
        (29 * 256 + 1, 1, 256),  # 30 steps
        (29 * 256, 1, 128),  # 29
        (10**4, 4, 64),
        (2000, 1, 64),
        (26, 1, 8),
    ],
)
def test_on_gpus_the_batch_size_leaves_thirty_steps_per_epoch(num_images, num_workers, expected):
    config = settings.resolve(TrainConfig(data_dir="d", num_workers=num_workers))
    resolved = settings.resolve_step(config, True, num_images)
    assert (resolved.batch_size, resolved.use_gpu) == (expected, "true")
    assert resolved.lr == pytest.approx(0.02 * expected * num_workers / 32)
    on_cpu = settings.resolve_step(config, False, num_images)
    assert (on_cpu.batch_size, on_cpu.use_gpu, on_cpu.lr) == (32, "false", pytest.approx(0.02 * num_workers))
    given = settings.resolve_step(dataclasses.replace(config, batch_size=48, lr=0.5), True, num_images)
    assert (given.batch_size, given.lr) == (48, 0.5)


@pytest.fixture(scope="module")
def table_run(finished_run, red_blue_root, tmp_path_factory):
    """A run on a table of labels that names two missing files, with weighted classes and a head that does not learn."""
    folder = tmp_path_factory.mktemp("table")
    rows = ["path,label,split", *(f"gone-{i}.jpg,red,train" for i in range(2))]
    for path in sorted(red_blue_root.rglob("*.jpg")):
        split, label, name = path.parts[-3:]
        rows.append(f"{split}/{label}/{name},{label},{split}")
    table = folder / "labels.csv"
    table.write_text("\n".join(rows))
    config = dataclasses.replace(
        finished_run.config,
        labels=str(table),
        storage_path=str(folder),
        epochs=20,
        patience=1,
        lr=1e-30,
        class_weights="auto",
        freeze="backbone",
        augment="none",
    )
    events = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"file://{folder}/mlruns")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setattr(start, "on_existing_cluster", lambda: False)
        train(config, events.append)
    return SimpleNamespace(config=config, folder=folder / "run", table=table, lines=lines_of(events))


def test_a_table_of_labels_may_name_missing_files(table_run, red_blue_root):
    left_out = pq.read_table(table_run.folder / "left_out.parquet").select(["path", "status"]).to_pylist()
    assert left_out == [{"path": f"{red_blue_root}/gone-{i}.jpg", "status": "not_found"} for i in range(2)]
    assert pq.read_table(table_run.folder / "val_predictions.parquet").num_rows == 14


def test_patience_ends_a_run_whose_validation_loss_does_not_decrease(table_run):
    assert [row["epoch"] for row in read_summary(table_run.folder)] == ["1", "2"]
    assert "stopped: no lower validation loss for 1 epochs (--patience)" in table_run.lines
    assert (table_run.folder / "report.html").exists()


def test_every_epoch_and_the_files_of_a_run_are_logged_to_mlflow(table_run):
    (run,) = (table_run.folder.parent / "mlruns" / "0").glob("*/")
    losses = [line.split()[1:] for line in (run / "metrics" / "val_loss").read_text().splitlines()]
    expected = [row["val_loss"] for row in read_summary(table_run.folder)]
    assert [(f"{float(value):.6g}", epoch) for value, epoch in losses] == list(zip(expected, ["1", "2"], strict=True))
    assert (run / "params" / "class_weights").read_text() == "auto"
    for name in ("report.html", "best/model.safetensors"):
        assert (run / "artifacts" / name).read_bytes() == (table_run.folder / name).read_bytes()


def test_class_weights_are_reported(table_run):
    assert "class weights from 0.933 (red) to 1.08 (blue)" in table_run.lines  # 15 and 13 images


def test_a_table_of_labels_may_not_change_on_resume(table_run, tmp_path):
    args = yaml.safe_load((table_run.folder / "args.yaml").read_text())
    assert args["labels_sha256"] == hashlib.sha256(table_run.table.read_bytes()).hexdigest()
    shutil.copytree(table_run.folder, tmp_path / "run")
    (tmp_path / "labels.csv").write_text(table_run.table.read_text().rsplit("\n", 1)[0])
    args |= {"labels": f"{tmp_path}/labels.csv"}
    (tmp_path / "run" / "args.yaml").write_text(yaml.safe_dump(args))
    config = dataclasses.replace(table_run.config, labels=args["labels"], storage_path=str(tmp_path), resume=True)
    with pytest.raises(InputError, match=r"labels\.csv has changed since the run began; restore the table of --labels"):
        train(config)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((), 0),
        ((1.0,), 0),
        ((1.0, 0.9), 0),
        ((1.0, 1.0), 1),
        ((0.9, 1.0, 0.95), 2),
        ((math.nan, math.nan), 1),
        ((math.nan, 1.0), 0),
    ],
)
def test_epochs_without_a_lower_validation_loss_are_counted(losses, expected):
    assert History([{"val_loss": loss} for loss in losses]).num_without_improvement == expected


def test_class_weights_give_every_class_the_same_share_of_the_loss():
    targets_N = np.repeat(np.arange(3, dtype=np.int32), [6, 3, 1])
    weights_K = compute_class_weights(targets_N)
    torch.testing.assert_close(weights_K * torch.tensor([6, 3, 1]), torch.full((3,), 10 / 3))


def test_a_step_minimizes_the_weighted_mean_of_torch():
    generator = torch.Generator().manual_seed(0)
    inputs_ND, targets_N = torch.randn((10, 4), generator=generator), torch.tensor([0] * 6 + [1] * 3 + [2])
    weights_K = compute_class_weights(targets_N.to(torch.int32).numpy())
    model, plain = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    plain.load_state_dict(model.state_dict())
    config = TrainConfig(data_dir="d", lr=0.5, weight_decay=0.0)
    optimizer, plain_optimizer = build_optimizer(model, config), build_optimizer(plain, config)
    set_learning_rate(optimizer, 0.5, torch.device("cpu"))
    set_learning_rate(plain_optimizer, 0.5, torch.device("cpu"))
    train_step(model, optimizer, (inputs_ND, targets_N), config, Ranks(), weights_K)
    loss = torch.nn.CrossEntropyLoss(weights_K, label_smoothing=config.label_smoothing)(plain(inputs_ND), targets_N)
    loss.backward()
    plain_optimizer.step()
    torch.testing.assert_close(model.weight, plain.weight)


def test_resume_of_a_missing_run_is_an_error(finished_run):
    with pytest.raises(InputError, match="nothing to resume"):
        train(dataclasses.replace(finished_run.config, name="absent", resume=True))


@pytest.mark.usefixtures("on_local_ray")
def test_two_workers_resume_at_the_next_step_when_one_is_killed(finished_run, ray_head, tmp_path):
    events, listens_on = [], set()
    config = dataclasses.replace(
        finished_run.config, storage_path=str(tmp_path), num_workers=2, batch_size=1, save_every=0.01
    )
    killing = call_once_exists(
        f"{tmp_path}/run/last/step_state.pt", lambda: listens_on.update(kill_training_worker(ray_head.pid))
    )
    train(config, events.append)
    killing.join()
    lines = lines_of(events)
    assert any(re.fullmatch(r"a worker died: the group restarted after step \d+ of epoch 1", line) for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == ["1/2", "2/2"]
    assert listens_on
    assert listens_on <= LOOPBACK


@pytest.mark.usefixtures("on_local_ray")
def test_a_full_disk_ends_the_run_at_once_and_says_how_to_resume(finished_run, ray_head, tmp_path):
    events = []

    def on_event(event):
        events.append(event)
        if isinstance(event, Message) and event.text.startswith("training on"):
            for worker in list_training_workers(ray_head.pid):
                worker.rlimit(psutil.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # for a file, as a quota is for a folder

    with pytest.raises(RunError) as raised:
        train(dataclasses.replace(finished_run.config, storage_path=str(tmp_path)), on_event)
    text = str(raised.value)
    assert text.startswith(f"cannot write {tmp_path}/run/last/training_state.pt: File too large; no epoch is finished")
    assert text.endswith("to resume, repeat the command with --name run --resume")
    assert not any("restarted" in line for line in lines_of(events))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"args.yaml", "last"}


@pytest.mark.usefixtures("on_local_ray")
def test_a_run_that_another_one_took_over_stops_and_writes_nothing_more(finished_run, tmp_path):
    lease = tmp_path / "run" / "_lease.json"

    def on_event(event):
        if isinstance(event, Message) and event.text.startswith("epoch 1/"):
            lease.write_text('{"token": "of the next driver"}')

    with pytest.raises(RunError, match=r"another training run took over the lease; this one stops; 1 finished epochs"):
        train(dataclasses.replace(finished_run.config, storage_path=str(tmp_path), epochs=9), on_event)
    assert lease.exists()
    assert load_saved_run(str(tmp_path / "run"), saves_every_epoch=True).history.epoch < 9


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_global_batches_do_not_depend_on_the_number_of_workers(world_size):
    global_batch, num_rows = 12, 31
    plans = [
        EpochPlan(num_rows=num_rows, seed=5, batch_size=global_batch // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    single = EpochPlan(num_rows=num_rows, seed=5, batch_size=global_batch, rank=0, world_size=1)
    for epoch in (1, 2):
        steps = [np.concatenate(parts) for parts in zip(*(plan.steps(epoch) for plan in plans), strict=True)]
        assert [rows.tolist() for rows in steps] == [rows.tolist() for rows in single.steps(epoch)]
        assert sorted(np.concatenate(steps).tolist()) == list(range(num_rows))
        assert [len(rows) for rows in steps] == [12, 12, 7]


def test_row_order_depends_only_on_epoch_and_seed():
    plan = EpochPlan(num_rows=50, seed=1, batch_size=50, rank=0, world_size=1)
    other_seed = dataclasses.replace(plan, seed=2)
    assert plan.steps(1)[0].tolist() == plan.steps(1)[0].tolist()
    assert plan.steps(1)[0].tolist() != plan.steps(2)[0].tolist()
    assert plan.steps(1)[0].tolist() != other_seed.steps(1)[0].tolist()


def test_learning_rate_warms_up_then_decays_to_nearly_zero(finished_run):
    config = dataclasses.replace(finished_run.config, epochs=10, lr=1.0, warmup_epochs=1.0)
    rates = [compute_learning_rate(config, step, 20) for step in range(200)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates.index(max(rates)) in (19, 20)
    assert max(rates) == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[20:]))
    assert rates[-1] < 1e-3


def test_validation_images_are_decoded_once(ray_cluster, red_blue_root, red_blue_checkpoint, tmp_path):
    start_ray()
    shutil.copytree(red_blue_root / "validation", tmp_path / "images")
    (tmp_path / "images" / "red" / "empty.jpg").write_bytes(b"")
    labelled = list_evaluation(LabelSource(str(tmp_path / "images")), None)
    config = TrainConfig(data_dir=str(tmp_path), precision="fp32")
    worker = build_train_worker(config, labelled, labelled, silent)
    checkpoint = read_checkpoint(str(red_blue_checkpoint))
    model = worker.model
    load_state_dict_strictly(model, checkpoint.load_state_dict(), checkpoint.uri)
    inputs = ImageInputs(worker)
    first = pa.concat_tables(inputs.predict_validation(model))
    shutil.rmtree(tmp_path / "images")
    assert pa.concat_tables(inputs.predict_validation(model)).equals(first)
    assert first["status"].to_pylist().count("empty") == 1
    assert first["label"].null_count == 1
    again = pa.concat_tables(ImageInputs(worker).predict_validation(model))
    assert again["status"].to_pylist() == ["not_found"] * labelled.files.num_rows


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_share_whole_validation_batches(world_size):
    shares = [list_validation_batches(70, Ranks(rank, world_size)) for rank in range(world_size)]
    batches = sorted(batch.tolist() for share in shares for batch in share)
    assert batches == [list(range(32)), list(range(32, 64)), list(range(64, 70))]


@pytest.mark.usefixtures("on_local_ray")
def test_a_bug_in_a_worker_ends_the_run_with_its_traceback_and_without_a_restart(finished_run, tmp_path, monkeypatch):
    cpus = dataclasses.replace(data.allocate_cpus(1), decode="one")  # the worker passes it to Ray as a number
    monkeypatch.setattr(data, "allocate_cpus", lambda num_models: cpus)
    events = []
    with pytest.raises(RuntimeError, match=r"(?s)in train_loop_per_worker\n.*TypeError") as raised:
        train(dataclasses.replace(finished_run.config, storage_path=str(tmp_path)), events.append)
    assert not isinstance(raised.value, CatsdogsError)
    assert sum("TypeError" in line for line in lines_of(events)) == 1
    assert "bug in catsdogs" in raised.value.__notes__[0]


def test_auto_precision_is_resolved_once_and_restored_on_resume(finished_run, tmp_path):
    config = dataclasses.replace(finished_run.config, storage_path=str(tmp_path), name="auto", precision="auto")
    uri, device, lines = str(tmp_path / "auto"), torch.device("cpu"), []
    with Lease(uri, silent, "training run", "--name") as lease:
        folder = RunFolder(uri, CLASSES, Preprocessing(), lease)
        settings.write_args(config, folder, {})
        chosen = settings.choose_precision(folder, device, lines.append)
        assert chosen in ("fp32", "bf16")
        assert yaml.safe_load((tmp_path / "auto" / "args.yaml").read_text())["precision"] == chosen
        resumed = settings.restore_settings(dataclasses.replace(config, resume=True), uri)
        assert resumed == dataclasses.replace(config, resume=True, precision=chosen)
        other = "fp32" if chosen == "bf16" else "bf16"
        settings.write_args(dataclasses.replace(resumed, precision=other), folder, {})
        assert settings.choose_precision(folder, device, lines.append) == other
