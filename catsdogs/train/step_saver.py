"""Save the state within an epoch every `--save-every` seconds, while the steps continue.

If Ray announces that a node of the workers will be preempted, the state is saved again and again until then.
"""

import copy
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property, partial

import ray.train
import torch

from catsdogs import storage
from catsdogs.train.events import PreemptionNotice, StepSaved
from catsdogs.train.inputs import LeftOutImages
from catsdogs.train.run_folder import LAST, STEP_STATE, CheckpointWriter
from catsdogs.train.step_state import EpochProgress, StepState, hash_training_files
from catsdogs.train.worker import TrainWorker

CHECK_INTERVAL_S, CHECK_INTERVAL_AFTER_NOTICE_S = 1.0, 0.25
MAX_CHECK_STEPS = 1000


class StepSaver:
    """Saves the state within an epoch when it is due.

    The first worker decides about once in CHECK_INTERVAL_S, and says after how many steps it decides again, so that all
    workers take part in a save after the same step. It copies the tensors and writes them in a thread: no step waits
    for the storage.

    Args:
        checkpoints: while it keeps epochs in memory that are not saved, a state within the next one is of no use.
    """

    def __init__(self, worker: TrainWorker, checkpoints: CheckpointWriter, left_out: LeftOutImages) -> None:
        self._worker = worker
        self._checkpoints = checkpoints
        self._left_out = left_out
        self._uri = worker.spec.folder.path(LAST, STEP_STATE)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="step-state")
        self._writing: Future[StepSaved] | None = None
        self._has_file = worker.ranks.is_first and storage.exists(self._uri)
        self._saved_at = self._checked_at = time.monotonic()
        self._num_steps = self._num_left = 1  # between the last check and the next; until the next
        self._notice: ray.train.PreemptionInfo | None = None

    def save_if_due(self, epoch: int, num_steps: int, sums: torch.Tensor, seconds: float) -> None:
        """Save the state after a step if it is due. Every worker calls this after each step.

        Args:
            num_steps: that were taken of the epoch.
            sums: as `train_step` returns them, over this worker's rows of these steps.
            seconds: that they took.
        """
        self._num_left -= 1
        if self._num_left:
            return
        # On a local Ray, nothing announces a preemption.
        notice = None if self._worker.spec.ray_is_local else ray.train.get_preemption_info()
        is_due, self._num_left = self._worker.ranks.broadcast(partial(self._check, notice))
        if not is_due:
            return
        self._left_out.report(self._worker)
        global_sums = self._worker.ranks.all_reduce(sums.clone()).tolist()
        if self._worker.ranks.is_first:
            self._write(epoch, EpochProgress(num_steps, global_sums, seconds, self._left_out.reported))

    def _check(self, notice: ray.train.PreemptionInfo | None) -> tuple[bool, int]:
        """Return whether a save is due, and after how many steps to check again."""
        now_s = time.monotonic()
        self._report_written()
        if notice is not None and notice != self._notice:
            self._worker.events.send(PreemptionNotice(tuple(notice.preempted_node_ids), notice.deadline_ms))
        self._notice = notice
        interval_s = CHECK_INTERVAL_S if notice is None else CHECK_INTERVAL_AFTER_NOTICE_S
        step_s = max(now_s - self._checked_at, 1e-6) / self._num_steps
        self._checked_at = now_s
        self._num_steps = min(max(1, round(interval_s / step_s)), MAX_CHECK_STEPS)
        is_due = notice is not None or now_s - self._saved_at >= self._worker.spec.config.save_every
        has_unsaved_epochs = self._checkpoints.num_saved < self._worker.history.epoch
        return is_due and self._writing is None and not has_unsaved_epochs, self._num_steps

    @cached_property
    def _files_sha256(self) -> str:
        return hash_training_files(self._worker.spec.train_files)

    def _report_written(self) -> None:
        """Report a state that is written; raise the error of one that could not be."""
        if self._writing is not None and self._writing.done():
            writing, self._writing = self._writing, None
            self._worker.events.send(writing.result())

    def wait(self) -> None:
        """Wait until the last state is written; raises the error of one that could not be."""
        if self._writing is not None:
            wait([self._writing])
            self._report_written()

    def _write(self, epoch: int, progress: EpochProgress) -> None:
        worker = self._worker
        state = StepState(
            epoch=epoch,
            **vars(progress),
            class_names=list(worker.spec.folder.class_names),
            follows=self._checkpoints.files,
            files_sha256=self._files_sha256,
            model={name: tensor.clone() for name, tensor in worker.model.state_dict().items()},
            optimizer=copy.deepcopy(worker.optimizer.state_dict()),
        )
        if worker.device.type == "cuda":
            torch.cuda.synchronize(worker.device)  # the thread reads the copies on another stream
        self._has_file, self._saved_at = True, time.monotonic()
        self._writing = self._executor.submit(self._write_state, state)

    def _write_state(self, state: StepState) -> StepSaved:
        self._worker.spec.folder.write(state.serialize(), LAST, STEP_STATE)
        return StepSaved(state.epoch, state.num_steps)

    def remove_saved(self) -> None:
        """Remove the state within an epoch that is saved. For the first worker."""
        self.wait()
        if self._checkpoints.num_saved < self._worker.history.epoch:
            return
        self._saved_at = time.monotonic()
        if self._has_file:
            self._worker.spec.folder.lease.check()
            storage.remove(self._uri)
            self._has_file = False
