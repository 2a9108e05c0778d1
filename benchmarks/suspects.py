"""Flip labels at random and count which ones `audit --suspects` finds, beside cleanlab on the same probabilities.

    python -m benchmarks.suspects runs/frozen --flips 100

The features are those of the training images of a run with `--freeze backbone` on class folders.
"""

import argparse
import time

import numpy as np
import numpy.typing as npt
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_self_confidence_for_each_label
from sklearn.metrics import roc_auc_score

from catsdogs import storage
from catsdogs.auditing.confident_learning import rate_labels
from catsdogs.auditing.folds import IndexArray, assign_folds
from catsdogs.auditing.heads import DoubleArray, FloatArray, predict_out_of_sample
from catsdogs.labels import TRAIN
from catsdogs.schema import OK
from catsdogs.train.feature_files import find_location, iter_parts

BoolArray = npt.NDArray[np.bool_]
SEEDS = range(5)


def read_training_features(run: str) -> tuple[FloatArray, IndexArray]:
    """Read the mean features of all views, (N, D), and the index of each image's folder."""
    uri = find_location(storage.absolute(run))
    assert uri is not None, f"{run}: expected a run with --freeze backbone"
    features, folders = [], []
    for part in iter_parts(uri, TRAIN):
        is_ok_N = np.array([status == OK for status in part.rows["status"].to_pylist()])
        features.append(part.features_NVD[is_ok_N].mean(axis=1))
        paths = np.array(part.rows["path"].to_pylist(), dtype=object)[is_ok_N]
        folders += [storage.parent_name(path) for path in paths]
    return np.concatenate(features), np.unique(folders, return_inverse=True)[1].astype(np.int64)


def describe(is_flipped_N: BoolArray, self_confidence_N: DoubleArray, flagged_N: BoolArray) -> str:
    """Format how many of as many labels as were flipped are flipped, the AUROC, and the flagged labels."""
    num_flips = int(is_flipped_N.sum())
    found = int(is_flipped_N[np.argsort(self_confidence_N, kind="stable")[:num_flips]].sum())
    auroc = roc_auc_score(is_flipped_N, 1 - self_confidence_N)
    num_flagged, num_correct = int(flagged_N.sum()), int((flagged_N & is_flipped_N).sum())
    return f"{found} of the first {num_flips}, AUROC {auroc:.4f}, flagged {num_flagged}, of which flipped {num_correct}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--flips", type=int, default=100)
    args = parser.parse_args()
    features_ND, labels_N = read_training_features(args.run)
    num_images, num_classes = len(labels_N), int(labels_N.max()) + 1
    for seed in SEEDS:
        generator = np.random.default_rng(seed)
        is_flipped_N = np.isin(np.arange(num_images), generator.choice(num_images, args.flips, replace=False))
        shift_N = np.where(is_flipped_N, generator.integers(1, num_classes, num_images), 0)
        noisy_N = (labels_N + shift_N) % num_classes
        started = time.perf_counter()
        probs_NK = predict_out_of_sample(
            features_ND, noisy_N, assign_folds(noisy_N, np.arange(num_images)), num_classes
        )
        quality = rate_labels(noisy_N, probs_NK)
        seconds = time.perf_counter() - started
        print(f"seed {seed}: {describe(is_flipped_N, quality.self_confidence_N, quality.flagged_N)}; {seconds:.1f} s")
        flagged_N = find_label_issues(noisy_N, probs_NK, filter_by="confident_learning", n_jobs=1)
        expected_N = get_self_confidence_for_each_label(noisy_N, probs_NK)
        print(f"   cleanlab: {describe(is_flipped_N, expected_N, flagged_N)}")


if __name__ == "__main__":
    main()
