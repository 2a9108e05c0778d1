"""The files of a run: kills between two files, files of other runs, versions, the lease. Nothing is trained here."""

import dataclasses
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
import torch
import yaml
from conftest import CLASSES, read_summary

from catsdogs import environment, storage
from catsdogs.checkpoint import read_config
from catsdogs.config import TrainConfig
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing
from catsdogs.lease import Lease, LeaseClaim
from catsdogs.progress import silent
from catsdogs.resnet import build_resnet50
from catsdogs.schema import PREDICTIONS
from catsdogs.train import settings, train
from catsdogs.train.events import NOT_RETRYABLE, EventSender, report_failures
from catsdogs.train.model import build_optimizer
from catsdogs.train.resume import SavedRun, load_saved_run
from catsdogs.train.run_folder import CheckpointWriter, History, RunFolder, hash_files

CONFIG = TrainConfig(data_dir="data", name="run", epochs=9)
FILES = ("summary.csv", "last/model.safetensors", "best/model.safetensors", "val_predictions.parquet")
CPU = torch.device("cpu")
# A validation row; epoch i has i of them.
VALIDATED = dict.fromkeys(PREDICTIONS.names) | {"path": "a", "status": "ok", "label": CLASSES[0], "index": 0}
VALIDATED |= {"prob": 0.75, "probs": [0.75, 0.25], "true_label": CLASSES[0]}


@functools.cache
def build_model():
    return build_resnet50(2, seed=0)


class Run(NamedTuple):
    """A run whose model is a constant in each epoch: `epochs` has their validation accuracies."""

    folder: RunFolder
    accuracies: tuple[float, ...]

    def history(self, epoch):
        zeros = dict.fromkeys(("train_loss", "train_accuracy", "val_loss", "lr", "images_per_s", "seconds"), 0.0)
        return History([zeros | {"epoch": i + 1, "val_accuracy": self.accuracies[i]} for i in range(epoch)])

    def save(self, epochs, files):
        """Save epochs, the last of them to disk."""
        writer = CheckpointWriter(self.folder, files, epochs[0] - 1, interval_s=1e9)
        for epoch in epochs:
            model = build_model()
            torch.nn.init.constant_(model.fc.bias, float(epoch))
            optimizer = build_optimizer(model, CONFIG)
            predictions = pa.Table.from_pylist([VALIDATED] * epoch, PREDICTIONS)
            writer.save(self.history(epoch), model, optimizer, predictions, is_last=epoch == epochs[-1])


def check_calibration(run, files, epoch):
    """Check that the calibration is that of the weights beside it, and of the rows of the best epoch."""
    if epoch:
        calibration = read_config(run.folder.path("best")).calibration
        assert calibration["model_sha256"] == files["best/model.safetensors"]
        assert calibration["n"] == run.history(epoch).best_epoch
        assert read_config(run.folder.path("last")).calibration is None


@pytest.fixture
def lease(tmp_path):
    with Lease(str(tmp_path / "run"), silent, "training run", "--name") as lease:
        yield lease


def make_run(lease, accuracies):
    return Run(RunFolder(lease.folder, CLASSES, Preprocessing(), lease), accuracies)


@pytest.fixture
def memory():
    """A folder in memory if possible, for many copies of large files."""
    root = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="catsdogs-kills-", dir=root if root.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


def copy_links(source, target):
    """Copy a folder as hard links: a run replaces files, it never changes one in place."""
    shutil.copytree(source, target, copy_function=os.link)


# The epochs of two saves, and their accuracies. With a frozen backbone, several epochs are saved at once.
SAVES = [
    pytest.param(((1,), (2,), (0.5, 0.6)), id="the second is the best", marks=pytest.mark.slow),
    pytest.param(((1,), (2,), (0.6, 0.5)), id="the first is the best", marks=pytest.mark.slow),
    pytest.param(((1,), (2, 3), (0.5, 0.7, 0.6)), id="the best is between two saves"),
    pytest.param(((), (1,), (0.5,)), id="the first save"),
]


@pytest.mark.parametrize("saves", SAVES)
def test_a_kill_between_two_files_leaves_complete_files_that_the_next_worker_makes_current(saves, memory, monkeypatch):
    first, second, accuracies = saves
    uri, killed_at = str(memory / "run"), []
    write = LeaseClaim.write

    def write_and_copy(claim, *file):
        copy_links(uri, memory / f"{len(killed_at)}")
        killed_at.append(memory / f"{len(killed_at)}")
        write(claim, *file)

    with Lease(uri, silent, "training run", "--name") as lease:
        run = make_run(lease, accuracies)
        run.folder.write_first_state()
        if first:
            run.save(first, hash_files(uri))
        old = hash_files(uri)
        with monkeypatch.context() as patch:
            patch.setattr(LeaseClaim, "write", write_and_copy)
            run.save(second, old)
        new = hash_files(uri)
        assert new["last/model.safetensors"] != old["last/model.safetensors"]
        for num_files, copy in enumerate(killed_at):
            shutil.rmtree(uri)
            copy_links(copy, uri)
            found = hash_files(uri)
            assert all(found[name] in (old[name], new[name]) for name in FILES)
            saved = load_saved_run(uri, saves_every_epoch=False)
            assert saved.history.epoch == (second[-1] if num_files else len(first))
            current = run.folder.restore_files(run.folder.load_state())
            assert hash_files(uri) == current == (new if num_files else old)
            check_calibration(run, current, second[-1] if num_files else len(first))
    assert len(killed_at) >= 4


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two runs of one epoch with different models."""
    root = tmp_path_factory.mktemp("runs")
    for name, epochs in (("a", (1,)), ("b", (1, 2))):
        with Lease(str(root / name), silent, "training run", "--name") as lease:
            run = make_run(lease, (0.5, 0.6))
            run.folder.write_first_state()
            run.save(epochs, hash_files(lease.folder))
    return root


@pytest.mark.parametrize("name", [*FILES, "last/training_state.pt"])
def test_a_file_of_another_run_is_refused_and_nothing_is_touched(two_runs, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(two_runs / "a", run, copy_function=os.link)
    (run / name).unlink()
    shutil.copy(two_runs / "b" / name, run / name)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    wrong = "summary.csv" if name.endswith(".pt") else name
    with pytest.raises(InputError, match=f"cannot resume {run}: {wrong} is damaged or of another run: .*SHA-256"):
        load_saved_run(str(run), saves_every_epoch=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("has_digests", [True, False])
def test_a_state_of_the_start_of_a_run_is_refused_once_epochs_are_saved(two_runs, tmp_path, has_digests):
    """A state without digests is of an earlier version: it is accepted."""
    shutil.copytree(two_runs / "a", tmp_path / "run")
    with Lease(str(tmp_path / "run"), silent, "training run", "--name") as lease:
        folder = make_run(lease, ()).folder
        folder.write_first_state()
        assert folder.load_state()["history"], "the state of a run is kept"
        digests = {"class_names": list(CLASSES), "sha256": {name: [None] for name in FILES}} if has_digests else {}
        folder.write_state({"history": []} | digests)
    if has_digests:
        with pytest.raises(InputError, match=r"summary.csv is damaged or of another run: expected no file, .*SHA-256"):
            load_saved_run(str(tmp_path / "run"), saves_every_epoch=True)
    else:
        assert load_saved_run(str(tmp_path / "run"), saves_every_epoch=True) == SavedRun(History())


def test_a_run_whose_state_was_lost_gets_no_first_state(two_runs, tmp_path):
    shutil.copytree(two_runs / "a", tmp_path / "run")
    (tmp_path / "run" / "last" / "training_state.pt").unlink()
    with Lease(str(tmp_path / "run"), silent, "training run", "--name") as lease:
        folder = make_run(lease, ()).folder
        folder.write_first_state()
        with pytest.raises(InputError, match=r"training_state\.pt"):
            folder.load_state()


def test_a_run_without_an_epoch_resumes(lease):
    make_run(lease, ()).folder.write_first_state()
    assert load_saved_run(lease.folder, saves_every_epoch=True) == SavedRun(History())


@pytest.mark.parametrize("digests", [[], None, "", 5, [5], {"a": "b"}])
def test_digests_of_other_types_are_damage(two_runs, tmp_path, digests):
    copy_links(two_runs / "a", tmp_path / "run")
    state_file = tmp_path / "run" / "last" / "training_state.pt"
    state = torch.load(state_file, weights_only=True)
    state_file.unlink()
    state["sha256"]["summary.csv"] = digests
    torch.save(state, state_file)
    with pytest.raises(InputError, match=r"training_state.pt is damaged: AssertionError"):
        load_saved_run(str(tmp_path / "run"), saves_every_epoch=True)


def test_best_and_last_that_are_swapped_are_refused(two_runs, tmp_path):
    with Lease(str(tmp_path / "run"), silent, "training run", "--name") as lease:
        run = make_run(lease, (0.6, 0.5))
        run.save((1,), hash_files(lease.folder))
        run.save((2,), hash_files(lease.folder))
    (tmp_path / "run" / "best").rename(tmp_path / "last")
    (tmp_path / "run" / "last" / "training_state.pt").rename(tmp_path / "last" / "training_state.pt")
    (tmp_path / "run" / "last").rename(tmp_path / "run" / "best")
    (tmp_path / "last").rename(tmp_path / "run" / "last")
    with pytest.raises(InputError, match=r"best/model.safetensors is damaged or of another run"):
        load_saved_run(str(tmp_path / "run"), saves_every_epoch=True)


@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_run_of_an_earlier_version_resumes_and_gets_digests(two_runs, tmp_path, is_ahead):
    """The earlier version wrote the state last: the other files may be those of an epoch that it does not have."""
    shutil.copytree(two_runs / "b", tmp_path / "run")
    state_file = tmp_path / "run" / "last" / "training_state.pt"
    state = torch.load(two_runs / ("a" if is_ahead else "b") / "last" / "training_state.pt", weights_only=True)
    torch.save({name: state[name] for name in ("history", "model", "optimizer")}, state_file)
    epoch = 1 if is_ahead else 2
    assert load_saved_run(str(tmp_path / "run"), saves_every_epoch=True).history.epoch == epoch
    with Lease(str(tmp_path / "run"), silent, "training run", "--name") as lease:
        folder = make_run(lease, ()).folder
        files = folder.restore_files(folder.load_state())
    assert files == hash_files(str(tmp_path / "run"))
    expected = hash_files(str(two_runs / ("a" if is_ahead else "b")))
    assert files | {"val_predictions.parquet": None} == expected | {"val_predictions.parquet": None}
    assert len(read_summary(tmp_path / "run")) == epoch
    assert load_saved_run(str(tmp_path / "run"), saves_every_epoch=True).class_names == CLASSES


# The lease


def test_a_second_command_is_refused_while_the_first_writes_to_the_run(two_runs, tmp_path, red_blue_root):
    config = TrainConfig(data_dir=str(red_blue_root), storage_path=str(tmp_path), name="run", resume=True)
    shutil.copytree(two_runs / "a", tmp_path / "run")
    (tmp_path / "run" / "args.yaml").write_text("damaged: [")  # it is not read
    with (
        Lease(str(tmp_path / "run"), silent, "training run", "--name"),
        pytest.raises(InputError, match=r"--name .*/run: another training run \(process .* is writing there"),
    ):
        train(config)
    with (
        Lease(str(tmp_path / "new"), silent, "training run", "--name"),
        pytest.raises(InputError, match="another training run"),
    ):
        train(dataclasses.replace(config, name="new", resume=False))
    assert not (tmp_path / "new" / "args.yaml").exists()


def test_a_new_run_that_fails_before_its_first_file_leaves_no_folder(tmp_path):
    with pytest.raises(InputError):
        train(TrainConfig(data_dir=str(tmp_path / "absent"), storage_path=str(tmp_path / "runs"), name="run"))
    assert storage.list_names(str(tmp_path / "runs")) == []


def test_a_worker_that_lost_the_lease_writes_nothing_and_is_not_restarted(lease):
    run = make_run(lease, (0.5,))
    events = []
    storage.write_bytes(lease.uri, b'{"token": "of the next driver"}')
    with pytest.raises(RuntimeError, match=NOT_RETRYABLE), report_failures(EventSender(events.append, 0), 0):
        run.save((1,), hash_files(lease.folder))
    assert storage.list_names(lease.folder) == ["_lease.json"]


def test_the_settings_of_a_resumed_run_are_written_only_if_they_changed(lease):
    folder = make_run(lease, ()).folder
    args = folder.path("args.yaml")
    settings.write_args(CONFIG, folder, {})
    first = storage.read_bytes(args)
    with pytest.raises(InputError, match="was taken by another run"):
        settings.write_args(dataclasses.replace(CONFIG, seed=5), folder, {})
    settings.write_args(dataclasses.replace(CONFIG, resume=True), folder, {})
    assert storage.read_bytes(args) == first
    settings.write_args(dataclasses.replace(CONFIG, resume=True, epochs=20), folder, {})
    assert yaml.safe_load(storage.read_bytes(args)) == yaml.safe_load(first) | {"epochs": 20}


def test_what_killed_writers_left_in_the_folders_of_a_run_is_removed(lease, tmp_path):
    for folder in ("", "best/", "last/", "features/0123456789abcdef/"):
        storage.write_bytes(f"{lease.folder}/{folder}kept", b"")
        storage.write_bytes(f"{lease.folder}/{folder}.model.0123456789abcdef.catsdogs", b"")
    make_run(lease, ()).folder.remove_temporaries()
    names = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert names == {"kept", "_lease.json"}


@pytest.mark.parametrize("left", ["_lease.json", "._lease.json.0123456789abcdef.catsdogs"])
def test_a_folder_with_nothing_but_a_killed_command_s_lease_is_a_new_run(tmp_path, left):
    storage.write_bytes(f"{tmp_path}/run/{left}", b'{"pid": 1}')
    config = dataclasses.replace(CONFIG, storage_path=str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("catsdogs.lease.LEASE_S", 0.0)
        with settings.lease_folder(config, f"{tmp_path}/run", silent) as lease:
            settings.write_args(config, make_run(lease, ()).folder, {})
    assert "args.yaml" in storage.list_names(f"{tmp_path}/run")


# Versions


def test_other_versions_are_reported_once_and_the_earlier_ones_are_kept(lease, monkeypatch):
    folder, lines = make_run(lease, ()).folder, []
    settings.write_args(dataclasses.replace(CONFIG, precision="fp32"), folder, {})
    assert settings.choose_precision(folder, CPU, lines.append) == "fp32"
    assert settings.choose_precision(folder, CPU, lines.append) == "fp32"
    assert lines == []
    record = yaml.safe_load(storage.read_bytes(folder.path("args.yaml")))
    first = record["environment"]
    assert (first["device"], first["precision"]) == ("cpu", "fp32")
    assert {"catsdogs", "torch", "pillow", "simplejpeg", "ray"} <= first.keys()

    monkeypatch.setattr(environment, "read_versions", lambda: dict.fromkeys(environment.PACKAGES, "9.9"))
    assert settings.choose_precision(folder, CPU, lines.append) == "fp32"
    assert settings.choose_precision(folder, CPU, lines.append) == "fp32"
    assert len(lines) == 1
    assert f"torch was {first['torch']}, is 9.9" in lines[0]
    record = yaml.safe_load(storage.read_bytes(folder.path("args.yaml")))
    assert record["earlier_environments"] == [first]
    assert record["environment"]["torch"] == "9.9"


def test_earlier_environments_of_another_type_are_replaced():
    record = {"environment": {"torch": "1"}, "earlier_environments": 5}
    updated, changes = environment.update_environment(record, "cpu", "fp32")
    assert updated["earlier_environments"] == [{"torch": "1"}]
    assert "torch was 1" in changes


@pytest.mark.parametrize("value", ["!!int ''", "!!timestamp x", "!!bool x", "!!float ''"])
def test_an_args_yaml_with_a_value_that_its_type_has_not_is_an_error(tmp_path, value):
    storage.write_bytes(f"{tmp_path}/run/args.yaml", f"epochs: {value}".encode())
    config = dataclasses.replace(CONFIG, storage_path=str(tmp_path), resume=True)
    with pytest.raises(InputError, match=r"args.yaml is damaged: .*start a new run"):
        settings.restore_settings(config, f"{tmp_path}/run")
