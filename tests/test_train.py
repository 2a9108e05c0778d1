"""train() on the session's Ray: what a run leaves, what it goes on from, what two workers share."""

import csv
import dataclasses
import io
import itertools
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import CLASSES, killing_at, lines_of, read_summary

from benchmarks.faults.proxy import Fault
from catsdogs import checkpoint, storage
from catsdogs.config import EvaluateConfig
from catsdogs.data import EpochPlan
from catsdogs.errors import InputError
from catsdogs.evaluate import evaluate
from catsdogs.labels import list_evaluation
from catsdogs.progress import Message, StageProgress, silent
from catsdogs.start import start_ray
from catsdogs.train import train
from catsdogs.train.image_inputs import ImageInputs
from catsdogs.train.step import learning_rate


def test_a_run_leaves_what_the_contract_names(finished_run):
    run = finished_run.folder
    names = {"best", "last", "summary.csv", "args.yaml", "val_predictions.parquet", "report.html"}
    assert {path.name for path in run.iterdir()} == names
    rows = read_summary(run)
    assert ",".join(rows[0]) == "epoch,train_loss,train_accuracy,val_loss,val_accuracy,lr,images_per_s,seconds"
    assert [row["epoch"] for row in rows] == ["1", "2"]
    args = yaml.safe_load((run / "args.yaml").read_text())
    assert args["lr"] == pytest.approx(0.02 * 8 / 32)
    assert args["use_gpu"] == "false"
    assert checkpoint.load(str(run / "best")).class_names == CLASSES


def test_every_epoch_is_a_line_with_its_numbers(finished_run):
    epochs = [line for line in lines_of(finished_run.events) if line.startswith("epoch ")]
    assert len(epochs) == 2
    for word in ("loss", "accuracy", "img/s", "ETA"):
        assert word in epochs[0]


def test_best_accuracy_its_predictions_and_evaluate_agree_to_the_last_row(finished_run, tmp_path):
    config = EvaluateConfig(
        data_dir=finished_run.config.data_dir,
        checkpoint=str(finished_run.folder / "best"),
        output=str(tmp_path),
        precision="fp32",
    )
    metrics = evaluate(config)
    kept = pq.read_table(finished_run.folder / "val_predictions.parquet")
    assert pq.read_table(tmp_path / "predictions.parquet").equals(kept)
    right = np.array(kept["label"].to_pylist()) == np.array(kept["true_label"].to_pylist())
    assert kept.num_rows == metrics["n"] == 14
    assert metrics["accuracy"] == right.mean() == finished_run.result.val_accuracy
    best = read_summary(finished_run.folder)[finished_run.result.best_epoch - 1]
    assert float(best["val_loss"]) == pytest.approx(metrics["log_loss"], rel=1e-5)


def test_a_run_from_a_bucket_into_a_bucket_interrupted_and_resumed_equals_one_on_the_disk(
    finished_run, red_blue_root, bucket, put, s3_proxy_if_any
):
    keys = {path: f"a data+set/{path.relative_to(red_blue_root)}" for path in sorted(red_blue_root.rglob("*.jpg"))}
    for path, key in keys.items():
        put(key, path.read_bytes())
    data_dir, run = f"s3://{bucket}/a data+set", f"s3://{bucket}/runs/run"
    config = dataclasses.replace(finished_run.config, data_dir=data_dir, storage_path=f"s3://{bucket}/runs")
    training = [key for key in keys.values() if "/train/" in key]
    if s3_proxy_if_any is not None:  # the second epoch is not over before Ctrl-C
        s3_proxy_if_any.reset(Fault("slow", keys=training, after_images=len(keys)))
    with pytest.raises(KeyboardInterrupt):
        train(config, press_ctrl_c_after_first_epoch)
    if s3_proxy_if_any is not None:
        s3_proxy_if_any.reset()
    assert [row["epoch"] for row in remote_summary(run)] == ["1"]
    events = []
    result = train(dataclasses.replace(config, resume=True), events.append)
    assert any("going on after epoch 1" in line for line in lines_of(events))

    for here, there in zip(read_summary(finished_run.folder), remote_summary(run), strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
            assert float(there[name]) == pytest.approx(float(here[name]), rel=1e-5), name
    expected, resumed = (
        checkpoint.load(uri).model.state_dict() for uri in (f"{finished_run.folder}/last", f"{run}/last")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0)

    output = f"s3://{bucket}/evaluation"
    metrics = evaluate(EvaluateConfig(data_dir=data_dir, checkpoint=f"{run}/best", output=output, precision="fp32"))
    assert metrics["accuracy"] == result.val_accuracy
    rows = pq.read_table(pa.BufferReader(storage.read_bytes(f"{output}/predictions.parquet")))
    kept = pq.read_table(finished_run.folder / "val_predictions.parquet")
    assert rows["label"].equals(kept["label"])
    np.testing.assert_allclose(rows["prob"].to_numpy(), kept["prob"].to_numpy(), atol=1e-5)


def remote_summary(run):
    return list(csv.DictReader(io.StringIO(storage.read_bytes(f"{run}/summary.csv").decode())))


def press_ctrl_c_after_first_epoch(event):
    if isinstance(event, Message) and event.text.startswith("epoch 1/"):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_damaged_settings_file_is_an_error_that_names_it(finished_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").write_bytes(b"{: \xff")
    with pytest.raises(InputError, match=r"args.yaml"):
        train(dataclasses.replace(finished_run.config, storage_path=str(tmp_path), resume=True))


def test_an_existing_run_is_refused_without_resume(finished_run):
    with pytest.raises(InputError, match="exists: expected a new --name"):
        train(finished_run.config)


def test_resume_refuses_other_settings_with_the_difference(finished_run):
    with pytest.raises(InputError, match=r"--batch-size was 8, is 4"):
        train(dataclasses.replace(finished_run.config, resume=True, batch_size=4, lr=0.005))
    with pytest.raises(InputError, match="may only grow"):
        train(dataclasses.replace(finished_run.config, resume=True, epochs=1))


def test_resume_of_nothing_is_refused(finished_run):
    with pytest.raises(InputError, match="nothing to resume"):
        train(dataclasses.replace(finished_run.config, name="absent", resume=True))


def test_two_workers_of_which_one_is_killed_go_on_after_the_last_finished_epoch(
    finished_run, ray_head, tmp_path, monkeypatch
):
    monkeypatch.setattr("catsdogs.train._waits_for_images", lambda config: True)  # as on GPUs
    events, on_event = killing_at("epoch 1/", ray_head.pid)
    config = dataclasses.replace(finished_run.config, storage_path=str(tmp_path), num_workers=2, batch_size=4)
    train(config, on_event)
    assert StageProgress("decode", 26, 26) in events
    lines = lines_of(events)
    assert "a worker died: the group restarted after epoch 1" in lines
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == ["1/2", "2/2"]
    told = next(line for line in lines if line.startswith("epoch 1/"))
    assert f"loss {float(read_summary(tmp_path / 'run')[0]['train_loss']):.4f}" in told  # it was not trained again


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_global_batches_do_not_depend_on_the_number_of_workers(world_size):
    global_batch, num_rows = 12, 31
    plans = [
        EpochPlan(num_rows=num_rows, seed=5, batch_size=global_batch // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    on_local_ray = EpochPlan(num_rows=num_rows, seed=5, batch_size=global_batch, rank=0, world_size=1)
    for epoch in (1, 2):
        steps = [np.concatenate(parts) for parts in zip(*(plan.steps(epoch) for plan in plans), strict=True)]
        assert [rows.tolist() for rows in steps] == [rows.tolist() for rows in on_local_ray.steps(epoch)]
        assert sorted(np.concatenate(steps).tolist()) == list(range(num_rows))
        assert [len(rows) for rows in steps] == [
            on_local_ray.global_rows(step) for step in range(on_local_ray.num_steps)
        ]


def test_order_changes_with_epoch_and_seed_alone():
    plan = EpochPlan(num_rows=50, seed=1, batch_size=50, rank=0, world_size=1)
    other_seed = dataclasses.replace(plan, seed=2)
    assert plan.steps(1)[0].tolist() == plan.steps(1)[0].tolist()
    assert plan.steps(1)[0].tolist() != plan.steps(2)[0].tolist()
    assert plan.steps(1)[0].tolist() != other_seed.steps(1)[0].tolist()


def test_learning_rate_warms_up_then_falls_to_nearly_zero(finished_run):
    config = dataclasses.replace(finished_run.config, epochs=10, lr=1.0, warmup_epochs=1.0)
    rates = [learning_rate(config, step, 20) for step in range(200)]
    assert rates[0] == pytest.approx(1 / 20)
    assert rates.index(max(rates)) in (19, 20)
    assert max(rates) == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[20:]))
    assert rates[-1] < 1e-3


def test_validation_images_are_decoded_once(ray_cluster, red_blue_root, red_blue_checkpoint, tmp_path):
    start_ray()
    shutil.copytree(red_blue_root / "validation", tmp_path / "images")
    (tmp_path / "images" / "red" / "empty.jpg").write_bytes(b"")
    labelled = list_evaluation(str(tmp_path / "images"), None, silent)
    model = checkpoint.load(str(red_blue_checkpoint))
    folder = SimpleNamespace(preprocessing=model.preprocessing, class_names=labelled.class_names)
    rows = np.arange(labelled.files.num_rows)
    worker = SimpleNamespace(
        spec=SimpleNamespace(folder=folder, decode_cpus=1.0),
        model=model.model,
        precision="fp32",
        device=torch.device("cpu"),
        validation_files=labelled.files,
        own_validation_batches=lambda: [rows[:8], rows[8:]],
    )
    pixels = ImageInputs(worker)
    first = pa.concat_tables(pixels.predict_validation())
    shutil.rmtree(tmp_path / "images")
    assert pa.concat_tables(pixels.predict_validation()).equals(first)
    assert first["status"].to_pylist().count("empty") == 1
    assert first["label"].null_count == 1
    assert pa.concat_tables(ImageInputs(worker).predict_validation())["status"].to_pylist() == ["not_found"] * len(rows)
