"""Runs in a local MLflow store."""

import math
import os
import subprocess
import sys

import mlflow
import pytest
from conftest import lines_of

from catsdogs.config import TrainConfig
from catsdogs.progress import silent
from catsdogs.train import tracking
from catsdogs.train.run_folder import SUMMARY_COLUMNS
from catsdogs.train.tracking import ARTIFACTS, track

CONFIG = TrainConfig(data_dir="data", name="first", epochs=3)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store for MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv(
        "MLFLOW_ALLOW_FILE_STORE", "true"
    )  # MLflow advises SQLite, which needs the package of its server
    return mlflow.MlflowClient(f"file://{tmp_path}/mlruns")


@pytest.fixture
def run_folder(tmp_path):
    """The URI of a finished run."""
    for name in ARTIFACTS:
        file = tmp_path / "run" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return str(tmp_path / "run")


def epoch_row(epoch):
    return dict.fromkeys(SUMMARY_COLUMNS, epoch / 10) | {"epoch": epoch}


def list_artifacts(client, run_id, folder=""):
    files = client.list_artifacts(run_id, folder)
    return {
        name for file in files for name in (list_artifacts(client, run_id, file.path) if file.is_dir else [file.path])
    }


def find_run(client, experiment_id="0"):
    (run,) = client.search_runs([experiment_id])
    return run


def test_a_run_has_its_settings_epochs_and_files(store, run_folder):
    events = []
    with track(CONFIG, run_folder, events.append) as tracker:
        assert find_run(store).info.status == "RUNNING"
        tracker.log_epoch(epoch_row(1))
        tracker.log_epoch(epoch_row(2) | {"val_loss": math.nan})
        tracker.log_files(run_folder)
    run = find_run(store)
    assert lines_of(events) == [f"logging to the MLflow run {run.info.run_id}"]
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params.items() >= {"data_dir": "data", "epochs": "3", "lr": "None", "optimizer": "sgd"}.items()
    history = store.get_metric_history(run.info.run_id, "val_accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.1), (2, 0.2)]
    assert math.isnan(run.data.metrics["val_loss"])
    assert list_artifacts(store, run.info.run_id) == set(ARTIFACTS)


def test_a_resumed_run_continues_its_mlflow_run(store, run_folder):
    for epoch, resume in ((1, False), (2, True)):
        config = TrainConfig(data_dir="data", name="first", epochs=epoch, resume=resume)
        with track(config, run_folder, silent) as tracker:
            tracker.log_epoch(epoch_row(epoch))
    run = find_run(store)
    assert [metric.step for metric in store.get_metric_history(run.info.run_id, "lr")] == [1, 2]
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_an_interrupted_run_has_its_status(store, run_folder, error, status):
    with pytest.raises(error), track(CONFIG, run_folder, silent):
        raise error
    assert find_run(store).info.status == status


def test_the_experiment_is_that_of_the_environment(store, run_folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "cats")
    with track(CONFIG, run_folder, silent):
        pass
    assert find_run(store, store.get_experiment_by_name("cats").experiment_id).info.status == "FINISHED"


def test_training_continues_without_a_server(run_folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    events = []
    with track(CONFIG, run_folder, events.append) as tracker:
        tracker.log_epoch(epoch_row(1))
        tracker.log_files(run_folder)
    (line,) = lines_of(events)
    assert line.startswith("not logged to MLflow any more, training continues: ")


def test_a_store_that_fails_later_is_reported_once(store, run_folder, tmp_path):
    events = []
    with track(CONFIG, run_folder, events.append) as tracker:
        (tmp_path / "mlruns").rename(tmp_path / "gone")
        tracker.log_epoch(epoch_row(1))
        tracker.log_epoch(epoch_row(2))
    assert [line.split(":")[0] for line in lines_of(events)[1:]] == [
        "not logged to MLflow any more, training continues"
    ]


def test_a_server_that_is_down_is_not_asked_for_minutes(run_folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "REQUEST_LIMITS", dict.fromkeys(tracking.REQUEST_LIMITS, "0"))
    for name in tracking.REQUEST_LIMITS:
        monkeypatch.setenv(name, "")  # so that the variable is restored
        monkeypatch.delenv(name)
    with track(CONFIG, run_folder, silent):
        assert {name: os.environ[name] for name in tracking.REQUEST_LIMITS} == tracking.REQUEST_LIMITS


def test_a_full_disk_does_not_end_a_training_that_is_logged(store, run_folder, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left on device")

    events = []
    with track(CONFIG, run_folder, events.append) as tracker:
        monkeypatch.setattr("tempfile.mkdtemp", fail)
        tracker.log_files(run_folder)
    assert lines_of(events)[1:] == ["not logged to MLflow any more, training continues: no space left on device"]


def test_a_package_that_cannot_be_imported_does_not_end_training(run_folder, monkeypatch, tmp_path):
    (tmp_path / "mlflow.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlflow")
    events = []
    with track(CONFIG, run_folder, events.append):
        pass
    (line,) = lines_of(events)
    assert line == "not logged to MLflow any more, training continues: Descriptors cannot be created directly"


def test_a_missing_package_is_said(run_folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///nowhere")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    events = []
    with track(CONFIG, run_folder, events.append) as tracker:
        tracker.log_epoch(epoch_row(1))
    assert lines_of(events) == ["MLFLOW_TRACKING_URI is set, but MLflow is not installed: pip install mlflow-skinny"]


def test_without_the_variable_nothing_is_imported():
    code = f"""
import sys
from catsdogs.config import TrainConfig
from catsdogs.train.tracking import track
with track({CONFIG!r}, "run", print) as tracker:
    tracker.log_epoch({{"epoch": 1}})
    tracker.log_files("run")
print("mlflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
