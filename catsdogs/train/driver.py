"""Start a run in the driver, the process that runs the command: settings, listing, weights; then workers and report.

Everything that needs no cluster is checked before Ray starts. The driver imports torch only for weights or a training
state of torch.save: Ray starts first, and the workers build the model.
"""

import dataclasses

from catsdogs import start, storage
from catsdogs.calibration import parse_calibration
from catsdogs.checkpoint import read_config
from catsdogs.config import TrainConfig
from catsdogs.errors import InputError
from catsdogs.images import Preprocessing
from catsdogs.labels import (
    LabelSource,
    TrainingFiles,
    check_same_classes,
    list_training,
    reindex_labels,
)
from catsdogs.lease import LeaseClaim
from catsdogs.progress import Message, Progress
from catsdogs.train import settings
from catsdogs.train.api import TrainResult
from catsdogs.train.resume import SavedRun, load_saved_run
from catsdogs.train.run_folder import BEST, History, RunFolder
from catsdogs.train.step_state import hash_training_files
from catsdogs.train.tracking import track
from catsdogs.weights import NONE, PretrainedWeights, read_pretrained


def train(config: TrainConfig, progress: Progress) -> TrainResult:
    """Fine-tune ResNet50 on the workers of a Ray cluster."""
    config = settings.resolve(config)
    uri = storage.join(config.storage_path, config.name or "")
    with settings.lease_folder(config, uri, progress) as lease:
        return _train(config, uri, lease, progress)


def _train(config: TrainConfig, uri: str, lease: LeaseClaim, progress: Progress) -> TrainResult:
    config = settings.restore_settings(config, uri)
    saved = load_saved_run(uri, config.freeze == "none") if config.resume else SavedRun(History())
    train_files, validation_files, digests = _list_files(config, saved, progress)
    settings.check_tables(config, uri, digests)
    folder = RunFolder(uri, train_files.class_names, Preprocessing(img_size=config.img_size), lease)
    sha256 = saved.step_files_sha256
    if sha256 is not None and sha256 != hash_training_files(train_files.files):
        progress(Message("the training images are others than before: the unfinished epoch starts again"))
        saved = saved._replace(step_files_sha256=None)
    weights = None if saved.has_model else _read_weights(config, folder.class_names, progress)

    start.import_while_ray_starts("catsdogs.train.trainer")
    from catsdogs.train import trainer  # not at the top: imports Ray Train

    use_gpu = trainer.resolve_use_gpu(config)
    config = settings.resolve_step(config, use_gpu, train_files.files.num_rows)
    progress(Message(f"{uri}: {_describe_steps(config)}"))
    folder.remove_temporaries()
    settings.write_args(config, folder, digests)
    files = (train_files.files, validation_files.files)
    with track(config, uri, progress) as tracker:
        reporter = trainer.run_workers(config, folder, files, weights, progress, tracker)
        assert reporter.precision is not None, "no worker reported its precision"
        config = dataclasses.replace(config, precision=reporter.precision)
        trainer.write_report_page(config, folder, reporter, train_files)
        tracker.log_files(uri)
    _report_calibration(folder, progress)
    best = reporter.history.rows[reporter.history.best_epoch - 1]
    return TrainResult(uri, best["val_accuracy"], reporter.history.best_epoch)


def _report_calibration(folder: RunFolder, progress: Progress) -> None:
    """Describe the calibration of the best epoch; without one, no validation image is classified."""
    uri = folder.path(BEST)
    calibration = read_config(uri).calibration
    if calibration is None:
        return
    try:
        progress(Message(parse_calibration(calibration, folder.class_names, uri).describe()))
    except InputError as error:  # of an earlier epoch, changed by another program; training does not need it
        progress(Message(str(error)))


def _list_files(config: TrainConfig, saved: SavedRun, progress: Progress) -> TrainingFiles:
    """List the training and validation files, with the class indices of the run to resume."""
    source = LabelSource.from_config(config)
    train_files, validation_files, digests = list_training(source, config.val_split, progress)
    if not saved.class_names:
        return TrainingFiles(train_files, validation_files, digests)
    check_same_classes(saved.class_names, train_files.class_names, f"the run {config.name}", source.place)
    train_files, validation_files = (
        reindex_labels(files, saved.class_names) for files in (train_files, validation_files)
    )
    return TrainingFiles(train_files, validation_files, digests)


def _describe_steps(config: TrainConfig) -> str:
    return (
        f"{config.num_workers} x {config.local_batch_size} = {config.global_batch_size} images a step, "
        f"learning rate {config.peak_lr:g}"
    )


def _read_weights(config: TrainConfig, class_names: tuple[str, ...], progress: Progress) -> PretrainedWeights | None:
    """Read and check the initial weights; None for random ones."""
    if config.weights == NONE:
        progress(Message("random weights"))
        return None
    weights = read_pretrained(config.weights)
    progress(Message(weights.check(class_names)))
    return weights
