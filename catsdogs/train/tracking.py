"""Log a run to MLflow if MLFLOW_TRACKING_URI is set; nothing is imported otherwise.

A run that is resumed continues its MLflow run, which has the tag RUN_TAG. If MLflow fails, training continues.
"""

import contextlib
import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from catsdogs import storage
from catsdogs.config import TrainConfig
from catsdogs.progress import Message, Progress
from catsdogs.text import format_reason
from catsdogs.train.run_folder import ARGS, BEST, REPORT, SUMMARY, VAL_PREDICTIONS, EpochRow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

TRACKING_URI = "MLFLOW_TRACKING_URI"
RUN_TAG = "catsdogs.run"  # the URI of the run's folder
# MLflow's own defaults, 7 retries and 120 s, delay a training by 4 minutes if the server is down, and by more than 16
# if it does not respond.
REQUEST_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
ARTIFACTS = (REPORT, SUMMARY, ARGS, VAL_PREDICTIONS, f"{BEST}/config.json", f"{BEST}/model.safetensors")


class Tracker:
    """Logs to one MLflow run, until a request fails; without a client, to none."""

    def __init__(self, progress: Progress, client: "MlflowClient | None" = None, run_id: str = "") -> None:
        self._progress = progress
        self._client = client
        self._run_id = run_id

    def log_epoch(self, row: EpochRow) -> None:
        """Log the metrics of a finished epoch."""
        step, now_ms = int(row["epoch"]), time.time_ns() // 1_000_000
        values = [(name, value, now_ms, step) for name, value in row.items() if name != "epoch"]
        self._request(lambda client: client.log_batch(self._run_id, metrics=_build_metrics(values)))

    def log_files(self, uri: str) -> None:
        """Log the report, the tables and the best checkpoint of a finished run as artifacts."""
        self._request(lambda client: _log_artifacts(client, self._run_id, uri))

    def end(self, status: str) -> None:
        """Set the final status: FINISHED, FAILED or KILLED."""
        self._request(lambda client: client.set_terminated(self._run_id, status))

    def _request(self, send: "Callable[[MlflowClient], object]") -> None:
        if self._client is None:
            return
        try:
            send(self._client)
        except Exception as error:  # noqa: BLE001 - of any store, server or proxy; none may end the training
            _report_failure(self._progress, error)
            self._client = None


@contextlib.contextmanager
def track(config: TrainConfig, uri: str, progress: Progress) -> Iterator[Tracker]:
    """Log the body's run at `uri`: its settings, then what the tracker is given; at the end, its status."""
    tracker = _start(config, uri, progress)
    try:
        yield tracker
        tracker.end("FINISHED")
    except Exception:
        tracker.end("FAILED")
        raise
    except BaseException:  # Ctrl-C, SIGTERM
        tracker.end("KILLED")
        raise


def _start(config: TrainConfig, uri: str, progress: Progress) -> Tracker:
    if not os.environ.get(TRACKING_URI):
        return Tracker(progress)
    try:
        import mlflow  # of the optional dependency `mlflow`
    except ModuleNotFoundError:
        logger.debug("no mlflow", exc_info=True)
        progress(Message(f"{TRACKING_URI} is set, but MLflow is not installed: pip install mlflow-skinny"))
        return Tracker(progress)
    except Exception as error:  # noqa: BLE001 - a dependency of it may be missing or of another version
        _report_failure(progress, error)
        return Tracker(progress)
    for name, value in REQUEST_LIMITS.items():
        os.environ.setdefault(name, value)
    try:
        client = mlflow.MlflowClient()
        run_id = _find_or_create_run(client, config, uri)
    except Exception as error:  # noqa: BLE001 - of any store, server or proxy; none may end the training
        _report_failure(progress, error)
        return Tracker(progress)
    progress(Message(f"logging to the MLflow run {run_id}"))
    return Tracker(progress, client, run_id)


def _find_or_create_run(client: "MlflowClient", config: TrainConfig, uri: str) -> str:
    """Return the ID of the MLflow run: of a resumed run, the same as before."""
    from mlflow.entities import Param

    experiment_id = _find_or_create_experiment(client)
    for run in client.search_runs([experiment_id]) if config.resume else ():
        if run.data.tags.get(RUN_TAG) == uri:
            client.update_run(run.info.run_id, "RUNNING")
            return str(run.info.run_id)
    run_id = str(client.create_run(experiment_id, tags={RUN_TAG: uri}, run_name=config.name).info.run_id)
    values = {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}
    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in values.items()])
    return run_id


def _find_or_create_experiment(client: "MlflowClient") -> str:
    """Return the ID of the experiment that MLflow's environment variables name, by default of `Default`."""
    if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return experiment_id
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    experiment = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if experiment is None else experiment.experiment_id)


def _log_artifacts(client: "MlflowClient", run_id: str, uri: str) -> None:
    with tempfile.TemporaryDirectory(prefix="catsdogs-mlflow-") as folder:
        for name in ARTIFACTS:
            file = Path(folder, name)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(storage.read_bytes(storage.join(uri, *name.split("/"))))
        client.log_artifacts(run_id, folder)


def _build_metrics(values: list[tuple[str, float, int, int]]) -> "list[Metric]":
    from mlflow.entities import Metric

    return [Metric(*value) for value in values]


def _report_failure(progress: Progress, error: Exception) -> None:
    logger.debug("MLflow failed", exc_info=error)
    progress(Message(f"not logged to MLflow any more, training continues: {format_reason(error)}"))
