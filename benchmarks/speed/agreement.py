"""How often the labels of what `score` computes with are those of plain fp32."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks.speed.checks import Checks
from benchmarks.speed.contestants import sample
from catsdogs import checkpoint
from catsdogs.images import Pixels, Preprocessing, decode
from catsdogs.predict import VALIDATION_BATCH_SIZE, Predictor, build_checked_predictor, configure_threads_and_malloc

NUM_COMPARED = 1000
LEAST_AGREEMENT = 0.995


def note_agreement(checks: Checks, images: Path, work: Path) -> None:
    """Label images both ways, with the head that the contestant before has trained."""
    trained = checkpoint.load(str(next((work / "out").glob("*/best"))))
    configure_threads_and_malloc(1)
    given = (trained.model, trained.preprocessing)
    exact = Predictor(*given, "fp32", torch.device("cpu"), plain=True)
    predictor, device_precision = build_checked_predictor(*given, "auto", torch.device("cpu"))
    folder = sample(images, NUM_COMPARED, work / f"compared-{NUM_COMPARED}")
    pairs = [(predictor(batch), exact(batch)) for batch in _batches(folder, trained.preprocessing)]
    found_NK, exact_NK = map(np.concatenate, zip(*pairs, strict=True))
    share = float((found_NK.argmax(axis=1) == exact_NK.argmax(axis=1)).mean())
    checks.note(
        f"Labels by `{device_precision}` that are those of plain fp32, of {len(found_NK):,} images, with a trained head: "
        f"{share:.1%} (asked: {LEAST_AGREEMENT:.1%}); probabilities differ by at most "
        f"{np.abs(found_NK - exact_NK).max():.4f}.",
        share >= LEAST_AGREEMENT,
    )


def _batches(folder: Path, preprocessing: Preprocessing) -> Iterator[Pixels]:
    paths = sorted(folder.rglob("*.jpg"))
    views = (preprocessing(image) for path in paths if (image := decode(path.read_bytes()).image) is not None)
    while batch := list(islice(views, VALIDATION_BATCH_SIZE)):
        yield np.stack(batch)
