"""score(): list -> decode -> classify -> commit, every listed file exactly once.

entries.py    --input -> the files to score
plan.py       the durable plan: which files each part holds, what is open
changes.py    a listing -> the plan: new files, changed ones, failed ones again
lease.py      one driver at a time
classify.py   the stage that holds the model
parts.py      rows -> parts, each committed whole
rounds.py     open shards -> rounds until none is open
audit.py      the proof that nothing is lost or doubled
run.py        one scoring, from its lease to `_SUCCESS`
show.py       the summary and the report
verify.py     the proof again, for anyone
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from catsdogs import data, saved, storage
from catsdogs.classify import ClassifyOptions, add_classifier
from catsdogs.config import ScoreConfig
from catsdogs.progress import Message, Progress, silent
from catsdogs.score.parts import PASSTHROUGH_COLUMNS, build_file_metadata
from catsdogs.score.run import RunSettings, run
from catsdogs.score.verify import verify
from catsdogs.start import start_ray


def score(config: ScoreConfig, progress: Progress = silent) -> dict[str, Any]:
    """Label every listed file that has no row yet; the content of `_summary.json`.

    Raises:
        InputError: the input, the checkpoint or the output cannot be used.
        RunError: the run failed; finished parts are kept, and the same command goes on.
    """
    config = dataclasses.replace(
        config,
        input=storage.absolute(config.input),
        checkpoint=storage.absolute(config.checkpoint),
        output=storage.absolute(config.output),
    )
    model = saved.read(config.checkpoint)
    return run(config, _identity(config, model), _Pipeline(config, model, progress), progress)


def _identity(config: ScoreConfig, model: saved.CheckpointFiles) -> RunSettings:
    settings = {
        "input": config.input,
        "limit": config.limit,
        "shard_size": config.shard_size,
        "max_pixels": config.max_pixels,
        "precision": config.precision,
        "model_sha256": model.sha256,
        "class_names": list(model.class_names),
        "preprocessing": dataclasses.asdict(model.preprocessing),
    }
    if config.save_embeddings:
        settings["save_embeddings"] = True
    return RunSettings(settings, build_file_metadata(model))


class _Pipeline:
    """Reads, decodes and labels with Ray Data, which starts with the first files."""

    def __init__(self, config: ScoreConfig, model: saved.CheckpointFiles, progress: Progress) -> None:
        self._config = config
        self._model = model
        self._progress = progress
        self.parallelism: dict[str, int] = {}

    def __call__(self, uris: Sequence[str]) -> Iterator[pa.Table]:
        """Label the files of manifests.

        Raises:
            CatsdogsError: one of our stages says that going on is of no use.
        """
        start_ray()
        options = ClassifyOptions.from_config(self._config, self._model, allow_gpu_jpegs=True)
        if not self.parallelism:
            self._progress(Message(f"labelling with {options.num_actors} x {options.device_name}"))
        self.parallelism = options.parallelism
        stage = options.stage(self._config.max_pixels)
        decoded = data.read_and_decode_manifests(uris, stage, options.cpus.decode)
        try:
            labelled = add_classifier(decoded, stage, options, PASSTHROUGH_COLUMNS, self._config.save_embeddings)
            with data.without_cluster_actors():
                yield from labelled.iter_batches(batch_size=None, batch_format="pyarrow")
        except Exception as error:
            own = data.unwrap_ray_error(error)
            if own is None:
                raise
            raise own from error


__all__ = ["score", "verify"]
