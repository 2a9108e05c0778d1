"""A training worker outside of Ray Train."""

from collections.abc import Callable

import torch

from catsdogs.config import TrainConfig
from catsdogs.images import Preprocessing
from catsdogs.labels import LabelledFiles
from catsdogs.lease import LeaseClaim
from catsdogs.resnet import build_resnet50
from catsdogs.train.events import EventSender
from catsdogs.train.model import build_optimizer
from catsdogs.train.run_folder import History, RunFolder
from catsdogs.train.spec import RunSpec
from catsdogs.train.worker import Ranks, TrainWorker

NO_LEASE = LeaseClaim("", "", "training run")  # such a worker writes no file of a run


def build_train_worker(
    config: TrainConfig,
    train_files: LabelledFiles,
    validation_files: LabelledFiles,
    put_event: Callable[[bytes], object],
) -> TrainWorker:
    """Build the only worker of a run, with initial weights, on a CPU in fp32."""
    preprocessing = Preprocessing(img_size=config.img_size)
    spec = RunSpec(
        config=config,
        folder=RunFolder(f"{config.storage_path}/{config.name}", train_files.class_names, preprocessing, NO_LEASE),
        train_files=train_files.files,
        validation_files=validation_files.files,
        weights=None,
        event_queue=None,
        decode_cpus=1.0,
    )
    model = build_resnet50(len(train_files.class_names), config.seed)
    return TrainWorker(
        spec=spec,
        ranks=Ranks(),
        device=torch.device("cpu"),
        precision="fp32",
        model=model,
        train_model=model,
        optimizer=build_optimizer(model, config),
        events=EventSender(put_event, rank=0),
        history=History(),
        saved_files={},
    )
