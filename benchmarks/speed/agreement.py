"""How often labels of `score` are equal: to those of plain fp32, and with two decoders."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import torch

from benchmarks.speed.checks import Checks
from benchmarks.speed.contestants import copy_sample
from catsdogs.checkpoint import read_checkpoint
from catsdogs.images import ImageArray, Preprocessing, decode_image
from catsdogs.predict import VALIDATION_BATCH_SIZE, Predictor, build_checked_predictor
from catsdogs.process_setup import configure_threads_and_malloc

NUM_COMPARED = 1000
MIN_AGREEMENT = 0.995


def check_agreement(checks: Checks, images: Path, work: Path) -> None:
    """Classify images both ways, with the head that the last contestant trained."""
    trained = read_checkpoint(str(next((work / "out").glob("*/best"))))
    configure_threads_and_malloc(1)
    state, device = trained.load_state_dict(), torch.device("cpu")
    reference = Predictor(state, trained.preprocessing, "fp32", device, plain=True)
    predictor, device_precision = build_checked_predictor(state, trained.preprocessing, "auto", device)
    folder = copy_sample(images, NUM_COMPARED, work / f"compared-{NUM_COMPARED}")
    pairs = [(predictor(batch), reference(batch)) for batch in _iter_batches(folder, trained.preprocessing)]
    probs_NK, reference_NK = map(np.concatenate, zip(*pairs, strict=True))
    share = float((probs_NK.argmax(axis=1) == reference_NK.argmax(axis=1)).mean())
    checks.add(
        f"Labels by `{device_precision}` that equal those of plain fp32, of {len(probs_NK):,} images, with a trained "
        f"head: {share:.1%} (goal: {MIN_AGREEMENT:.1%}); probabilities differ by at most "
        f"{np.abs(probs_NK - reference_NK).max():.4f}.",
        share >= MIN_AGREEMENT,
    )


def _iter_batches(folder: Path, preprocessing: Preprocessing) -> Iterator[ImageArray]:
    paths = sorted(folder.rglob("*.jpg"))
    images = (preprocessing(image) for path in paths if (image := decode_image(path.read_bytes()).image) is not None)
    while batch := list(islice(images, VALIDATION_BATCH_SIZE)):
        yield np.stack(batch)


def read_predictions(output: Path) -> pa.Table:
    """Read the labels that `score` wrote; a file is known by its name and its folder's, as in every sample."""
    table = ds.dataset(sorted(map(str, output.glob("part-*.parquet")))).to_table(["path", "label", "prob"])
    names = pc.extract_regex(table["path"], "(?P<name>[^/]*/[^/]*)$")
    return table.set_column(0, "name", pc.struct_field(names, "name"))


def compare_predictions(left: pa.Table, right: pa.Table) -> tuple[float, float]:
    """Return the share of files in both with the same label, and the largest difference of probabilities."""
    both = left.join(right, "name", join_type="inner", right_suffix="_right")
    is_same = pc.fill_null(pc.equal(both["label"], both["label_right"]), False)
    differences = pc.abs(pc.subtract(both["prob"], both["prob_right"]))
    return float(np.mean(is_same.to_numpy())), float(pc.max(differences).as_py())
