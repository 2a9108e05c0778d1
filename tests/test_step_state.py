"""The state within an epoch: an interrupted epoch continues at the very next step. Nothing here starts Ray."""

import dataclasses
import io
import pickle

import numpy as np
import pyarrow as pa
import pytest
import ray.train
import torch
from conftest import CLASSES
from workers import build_train_worker

from catsdogs import storage
from catsdogs.config import TrainConfig
from catsdogs.errors import InputError, RunError
from catsdogs.labels import LabelledFiles
from catsdogs.lease import Lease
from catsdogs.progress import silent
from catsdogs.schema import LABELLED_FILES, PREDICTIONS, read_table
from catsdogs.train import step_saver
from catsdogs.train.events import PreemptionNotice, ProgressReporter, Started, StepSaved
from catsdogs.train.inputs import LeftOutImages
from catsdogs.train.loop import build_step, train_epoch
from catsdogs.train.resume import load_saved_run
from catsdogs.train.run_folder import CheckpointWriter, History, hash_files
from catsdogs.train.step_saver import StepSaver
from catsdogs.train.step_state import EpochProgress, find_step_state, load_step_state

PATHS, BATCH_SIZE, SIZE, NUM_STEPS = tuple("abcd"), 2, 32, 2
LEFT_OUT = {"path": "damaged.jpg", "status": "truncated", "error": "half"}


class InterruptedEpochError(Exception):
    """Ends an epoch as a kill would."""


class DrawnInputs:
    """Batches of random images; `stop_after` interrupts an epoch after that many of its steps."""

    def __init__(self, worker, stop_after=None):
        self._plan, self._stop_after, self.before_batch = worker.plan, stop_after, lambda: None
        self.left_out = LeftOutImages(worker.progress.left_out)

    def iter_batches(self, epoch, first_step=0):
        images_NCHW = torch.from_numpy(np.random.default_rng(0).normal(size=(len(PATHS), 3, SIZE, SIZE))).float()
        for i, rows_N in enumerate(self._plan.steps(epoch)[first_step:], start=first_step):
            self.before_batch()
            if i == self._stop_after:
                raise InterruptedEpochError
            if i == 0:
                self.left_out.add(pa.Table.from_pylist([LEFT_OUT]))
            yield images_NCHW[rows_N], torch.from_numpy(rows_N % 2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small convolutions: threads cost more than they save."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def _checks_after_every_step(monkeypatch):
    monkeypatch.setattr(step_saver, "CHECK_INTERVAL_S", 0.0)
    monkeypatch.setattr(step_saver, "CHECK_INTERVAL_AFTER_NOTICE_S", 0.0)


@pytest.fixture
def lease(tmp_path):
    with Lease(str(tmp_path / "run"), silent, "training run", "--name") as lease:
        yield lease


def build_worker(lease, events=None, save_every=1e-9, paths=PATHS):
    """Build the worker of a run in the folder of the lease, as if no state were saved."""
    root, _, name = lease.folder.rpartition("/")
    config = TrainConfig(
        data_dir="data", storage_path=root, name=name, epochs=3, batch_size=BATCH_SIZE, save_every=save_every, lr=0.01
    )
    fields = [field for field in LABELLED_FILES if field.name in ("path", "true_index")]
    columns = {"path": list(paths), "true_index": [i % 2 for i in range(len(paths))]}
    files = LabelledFiles(CLASSES, pa.table(columns, schema=pa.schema(fields)))
    worker = build_train_worker(config, files, files, ([] if events is None else events).append)
    folder = dataclasses.replace(worker.spec.folder, lease=lease)
    spec = dataclasses.replace(worker.spec, folder=folder, ray_is_local=True)
    spec.folder.write_first_state()
    return dataclasses.replace(worker, spec=spec, saved_files=hash_files(lease.folder))


def resume(worker):
    """Restore the saved state within the epoch."""
    state = load_step_state(worker.spec.folder.uri, worker.spec.folder.load_state())
    worker.model.load_state_dict(state.model)
    worker.optimizer.load_state_dict(state.optimizer)
    return dataclasses.replace(worker, progress=state.progress)


def run_epoch(worker, stop_after=None, epoch=1):
    """Train an epoch from the worker's progress; return the totals, or None if it is interrupted."""
    inputs = DrawnInputs(worker, stop_after)
    saver = StepSaver(worker, CheckpointWriter(worker.spec.folder, worker.saved_files, epoch - 1, 0.0), inputs.left_out)
    inputs.before_batch = saver.wait  # the state after each step is written before the next
    try:
        return train_epoch(worker, inputs, build_step(worker), epoch, worker.progress, saver)
    except InterruptedEpochError:
        return None
    finally:
        saver.wait()


@pytest.mark.parametrize("stop_after", [1, NUM_STEPS])
def test_an_epoch_that_is_interrupted_after_any_step_gives_the_same_weights_and_totals(lease, stop_after):
    whole = build_worker(lease, save_every=1e9)
    expected = run_epoch(whole)
    assert not storage.exists(whole.spec.folder.path("last", "step_state.pt"))
    run_epoch(build_worker(lease), stop_after)
    resumed = resume(build_worker(lease))
    assert resumed.progress.num_steps == stop_after
    totals = run_epoch(resumed)
    assert totals[:3] == expected[:3]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    momenta = (worker.optimizer.state_dict()["state"].values() for worker in (resumed, whole))
    assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in zip(*momenta, strict=True))


def test_the_seconds_and_the_left_out_images_before_the_interruption_count(lease):
    run_epoch(build_worker(lease), stop_after=1)
    resumed = resume(build_worker(lease))
    resumed = dataclasses.replace(resumed, progress=dataclasses.replace(resumed.progress, seconds=1000.0))
    assert run_epoch(resumed).seconds > 1000
    assert resumed.progress.left_out == [LEFT_OUT]
    assert read_table(storage.read_bytes(f"{lease.folder}/left_out.parquet")).to_pylist() == [LEFT_OUT]


def test_states_are_reported_when_they_are_written_and_the_driver_says_where_the_run_continues(lease):
    sent, lines = [], []
    run_epoch(build_worker(lease, sent))
    saved = [event for event in map(pickle.loads, sent) if isinstance(event, StepSaved)]
    assert saved[-1] == StepSaved(epoch=1, num_steps=NUM_STEPS)
    config = build_worker(lease).spec.config
    reporter = ProgressReporter(
        dataclasses.replace(config, resume=True), lambda message: lines.append(message.text), None
    )
    reporter.on_event(Started(History(), "fp32", "cpu", num_steps=1))
    assert lines == ["training on 1 x cpu in fp32, resuming after step 1 of epoch 1"]
    reporter.on_event(saved[-1])
    assert reporter.describe_saved().startswith("no epoch is finished, and 2 steps of epoch 1 are saved; to resume")
    reporter.on_event(Started(History(), "fp32", "cpu", num_steps=2))
    assert lines[1:] == ["a worker died: the group restarted after step 2 of epoch 1"]


def finish_epoch(worker, checkpoints):
    """Save the first epoch."""
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "images_per_s", "seconds")
    worker.history.rows.append(dict.fromkeys(names, 0.0) | {"epoch": 1})
    checkpoints.save(worker.history, worker.model, worker.optimizer, PREDICTIONS.empty_table(), is_last=False)


def interrupt_and_finish(lease):
    """Interrupt epoch 1, resume it and save it; return the worker, and the state that its save makes old."""
    run_epoch(build_worker(lease), stop_after=1)
    worker = resume(build_worker(lease))
    old = storage.read_bytes(f"{lease.folder}/last/step_state.pt")
    inputs = DrawnInputs(worker)
    checkpoints = CheckpointWriter(worker.spec.folder, worker.saved_files, 0, 0.0)
    saver = StepSaver(worker, checkpoints, inputs.left_out)
    finish_epoch(worker, checkpoints)
    saver.remove_saved()
    return worker, old


def test_a_run_on_s3_resumes_within_an_epoch(bucket):
    with Lease(f"s3://{bucket}/run", silent, "training run", "--name") as lease:
        run_epoch(build_worker(lease), stop_after=1)
        resumed = resume(build_worker(lease))
        assert (resumed.progress.num_steps, resumed.progress.left_out) == (1, [LEFT_OUT])
        assert load_saved_run(lease.folder, saves_every_epoch=True).has_model


def test_the_state_within_an_epoch_ends_with_the_epoch(lease):
    worker, old = interrupt_and_finish(lease)
    uri = f"{lease.folder}/last/step_state.pt"
    assert not storage.exists(uri)
    storage.write_bytes(uri, old)  # as if the process had been killed before it removed the file
    assert load_step_state(lease.folder, worker.spec.folder.load_state()) is None
    assert load_saved_run(lease.folder, saves_every_epoch=True) == (worker.history, CLASSES, None)


def test_a_state_that_follows_other_files_is_of_another_run_and_refused(lease):
    run_epoch(build_worker(lease), stop_after=1)
    uri = f"{lease.folder}/last/step_state.pt"
    state, buffer = torch.load(uri, weights_only=True), io.BytesIO()
    torch.save(state | {"follows": state["follows"] | {"summary.csv": "0" * 64}}, buffer)
    storage.write_bytes(uri, buffer.getvalue())
    with pytest.raises(InputError, match=r"is of another run: .* remove it to resume after 0 finished epochs"):
        load_saved_run(lease.folder, saves_every_epoch=True)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-100], lambda _: b"", lambda _: pickle.dumps({"epoch": 1})]
)
def test_a_damaged_state_is_refused_with_what_to_do(lease, damage):
    run_epoch(build_worker(lease), stop_after=1)
    uri = f"{lease.folder}/last/step_state.pt"
    storage.write_bytes(uri, damage(storage.read_bytes(uri)))
    with pytest.raises(InputError, match=r"step_state.pt is damaged: .*; remove it to resume after 0 finished epochs"):
        load_saved_run(lease.folder, saves_every_epoch=True)


def test_a_run_without_a_finished_epoch_has_the_classes_and_the_model_of_its_state(lease):
    run_epoch(build_worker(lease), stop_after=1)
    saved = load_saved_run(lease.folder, saves_every_epoch=True)
    assert (saved.history.epoch, saved.class_names, saved.has_model) == (0, CLASSES, True)


def test_a_state_of_other_training_images_is_not_used(lease):
    run_epoch(build_worker(lease), stop_after=1)
    uri, state = lease.folder, build_worker(lease).spec.folder.load_state()
    assert find_step_state(uri, state, build_worker(lease).spec.train_files).num_steps == 1
    assert find_step_state(uri, state, build_worker(lease, paths="abce").spec.train_files) is None


def test_no_state_is_saved_while_finished_epochs_are_only_in_memory(lease):
    worker = build_worker(lease)
    inputs = DrawnInputs(worker)
    checkpoints = CheckpointWriter(worker.spec.folder, worker.saved_files, 0, interval_s=1e9)
    saver = StepSaver(worker, checkpoints, inputs.left_out)
    finish_epoch(worker, checkpoints)
    saver.remove_saved()
    train_epoch(worker, inputs, build_step(worker), 2, EpochProgress(), saver)
    assert not storage.exists(f"{lease.folder}/last/step_state.pt")


def test_a_state_that_cannot_be_written_ends_the_run(lease):
    worker = build_worker(lease)
    storage.write_bytes(f"{lease.folder}/_lease.json", b'{"token": "of another driver"}')
    with pytest.raises(RunError, match="another training run took over"):
        run_epoch(worker)


def test_an_announced_preemption_is_reported_once_and_saves_whenever_no_write_is_running(lease, monkeypatch):
    sent, lines, notice = [], [], ray.train.PreemptionInfo(1_800_000_000_000, {"node": [0]})
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: notice)
    worker = build_worker(lease, sent, save_every=1e9)
    worker = dataclasses.replace(worker, spec=dataclasses.replace(worker.spec, ray_is_local=False))
    run_epoch(worker)
    events = [pickle.loads(event) for event in sent]
    assert [event.num_steps for event in events if isinstance(event, StepSaved)] == [1, 2]
    notices = [event for event in events if isinstance(event, PreemptionNotice)]
    assert notices == [PreemptionNotice(("node",), 1_800_000_000_000)]
    reporter = ProgressReporter(worker.spec.config, lambda message: lines.append(message.text), None)
    for event in (Started(History(), "fp32", "cpu"), *notices, Started(History(), "fp32", "cpu", num_steps=3)):
        reporter.on_event(event)
    assert lines[1:] == [
        "Ray announces the preemption of node 'node' at 08:00:00 UTC: the state is saved until then",
        "a node was preempted: the group restarted after step 3 of epoch 1",
    ]
