"""Suspect labels: confident learning compared with cleanlab, folds, and heads compared with scikit-learn."""

import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cleanlab.filter import find_label_issues
from conftest import lines_of, red_or_blue
from sklearn.linear_model import LogisticRegression

from catsdogs.auditing import audit, rating
from catsdogs.auditing.confident_learning import rate_labels
from catsdogs.auditing.features import Features
from catsdogs.auditing.folds import NUM_FOLDS, assign_folds, join_groups
from catsdogs.auditing.heads import UNKNOWN, predict_out_of_sample
from catsdogs.checkpoint import NUM_FEATURES
from catsdogs.config import AuditConfig


def draw_noisy_probs(seed, num_images, num_classes, sharpness=3.0, decimals=None):
    """Draw labels of which a fifth are wrong, and probabilities that know some of the true ones."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, num_classes, num_images)
    is_wrong = generator.random(num_images) < 0.2
    labels = np.where(is_wrong, generator.integers(0, num_classes, num_images), truth)
    labels[:num_classes] = np.arange(num_classes)
    logits = generator.normal(size=(num_images, num_classes))
    logits[np.arange(num_images), truth] += sharpness * generator.random(num_images)
    probs = np.exp(logits)
    probs /= probs.sum(axis=1, keepdims=True)
    if decimals is not None:  # equal probabilities, and some that equal a threshold
        probs = np.round(probs, decimals) + 0.1
        probs /= probs.sum(axis=1, keepdims=True)
    return labels, probs


def shift_classes(labels, probs):
    """Make the model confuse class 0 with class 1, and sure of nothing."""
    probs = probs.copy()
    probs[labels == 0, 1] += 2
    return labels, probs / probs.sum(axis=1, keepdims=True)


CASES = {
    **{f"{k} classes, seed {seed}": draw_noisy_probs(seed, 300, k) for k in (2, 3, 10) for seed in range(3)},
    "few images": draw_noisy_probs(0, 7, 3),
    "unsure": draw_noisy_probs(1, 300, 10, sharpness=0.3),
    "ties": draw_noisy_probs(2, 300, 3, decimals=1),
    "ties of two classes": draw_noisy_probs(2, 300, 2, decimals=0),
    "confused classes": shift_classes(*draw_noisy_probs(3, 300, 3)),
    "a class without labels": (np.minimum(draw_noisy_probs(4, 300, 4)[0], 2), draw_noisy_probs(4, 300, 4)[1]),
    "certain": (np.array([0, 1, 2, 0]), np.eye(3)[[0, 1, 2, 1]]),
    "all equal": (np.array([0, 1, 0, 1]), np.full((4, 2), 0.5)),
}


@pytest.mark.parametrize("name", CASES)
def test_flags_and_ranking_equal_those_of_cleanlab(name):
    labels, probs = CASES[name]
    quality = rate_labels(labels, probs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranked = find_label_issues(
            labels, probs, filter_by="confident_learning", return_indices_ranked_by="self_confidence", n_jobs=1
        )
    flagged = np.flatnonzero(quality.flagged_N)
    assert sorted(ranked) == flagged.tolist()
    # Images of equal self-confidence may be in any order.
    np.testing.assert_array_equal(quality.self_confidence_N[ranked], np.sort(quality.self_confidence_N[flagged]))
    assert (quality.suggested_N[flagged] != labels[flagged]).all()


def test_an_image_is_counted_for_a_less_probable_class_whose_threshold_it_reaches():
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    probs = np.array([[0.9, 0.1, 0.0]] * 2 + [[0.1, 0.4, 0.5]] + [[0.2, 0.35, 0.45]] * 2 + [[0.0, 0.1, 0.9]] * 2)
    quality = rate_labels(labels, probs)
    assert quality.flagged_N.tolist() == [False, False, True, False, False, False, False]
    assert quality.suggested_N.tolist() == [0, 0, 1, 2, 2, 2, 2]  # without a flag, the most probable class


def test_folds_have_equal_shares_of_each_class_and_whole_groups():
    generator = np.random.default_rng(0)
    labels, groups = generator.integers(0, 3, 600), np.repeat(np.arange(200), 3)
    folds = assign_folds(labels, groups)
    counts = np.array([np.bincount(folds[labels == k], minlength=NUM_FOLDS) for k in range(3)])
    assert (counts.max(axis=1) - counts.min(axis=1) <= 3).all()
    assert all(len(set(folds[groups == group])) == 1 for group in range(200))
    assert (folds == assign_folds(labels, groups)).all()
    single = assign_folds(labels, np.arange(600))
    counts = np.array([np.bincount(single[labels == k], minlength=NUM_FOLDS) for k in range(3)])
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()


def test_a_rare_class_is_in_as_many_folds_as_it_has_groups():
    labels = np.array([0] * 40 + [1] * 3)
    groups = np.array([*range(40), 0, 1, 2])  # each beside images of the other class
    folds = assign_folds(labels, groups)
    assert len(set(folds[40:])) == 3


def test_images_that_share_a_key_are_one_group():
    names = pa.array(["a", "a", None, None, "b", "b", None])
    contents = pa.array([1, 2, 2, 3, 4, 5, None])
    assert join_groups(names, contents).tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert join_groups(pa.nulls(3, pa.string())).tolist() == [0, 1, 2]


def draw_features(num_images, num_classes, seed=0):
    """Draw labels and features that have them with much noise; one feature is constant."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_images)
    features = generator.normal(size=(num_images, 32)) + 0.2 * generator.normal(size=(num_classes, 32))[labels]
    features = features * generator.uniform(0.01, 100, 32) + 50
    features[:, 3] = 7.0
    return labels, features.astype(np.float32)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_probabilities_equal_those_of_a_logistic_regression_on_the_other_folds(num_classes):
    labels, features = draw_features(4200, num_classes)  # two chunks
    labels[:50] = UNKNOWN
    folds = assign_folds(np.maximum(labels, 0), np.arange(len(labels)))
    probs = predict_out_of_sample(features, labels, folds, num_classes)
    std = features.std(axis=0, dtype=np.float64)
    standardized = (features - features.mean(axis=0, dtype=np.float64)) / np.where(std > 0, std, 1)
    differences, losses = [], []
    for weight_decay in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
        expected = np.empty_like(probs)
        for fold in range(NUM_FOLDS):
            training = (folds != fold) & (labels != UNKNOWN)
            # Of two classes, scikit-learn has one vector of weights: the difference of ours.
            scale = 2 if num_classes == 2 else 1
            model = LogisticRegression(C=scale / (weight_decay * training.sum()), tol=1e-6, max_iter=1000)
            model.fit(standardized[training], labels[training])
            expected[folds == fold] = model.predict_proba(standardized[folds == fold])
        differences.append(np.abs(probs - expected).max())
        losses.append(-np.log(expected[np.arange(50, 4200), labels[50:]]).mean())
    assert min(differences) < 0.005
    assert np.argmin(differences) == np.argmin(losses)


def test_the_features_that_heads_are_trained_on_may_be_a_file(tmp_path):
    labels, features = draw_features(200, 2)
    mapped = np.memmap(tmp_path / "features", np.float32, "w+", shape=features.shape)
    mapped[:] = features
    folds = assign_folds(labels, np.arange(200))
    expected = predict_out_of_sample(features, labels, folds, 2)
    np.testing.assert_array_equal(predict_out_of_sample(mapped, labels, folds, 2), expected)


@pytest.fixture
def labelled(tmp_path):
    """Draw 15 red and 15 blue pictures and a broken one; a table has 3 incorrect labels and one of a rare class.

    Returns:
        The table, and the incorrect labels by path.
    """
    rows = []
    for i in range(15):
        for label in ("red", "blue"):
            (tmp_path / f"{label}-{i}.jpg").write_bytes(red_or_blue(label, i))
            rows.append({"path": f"{label}-{i}.jpg", "label": label})
    incorrect = {"red-3.jpg": "blue", "red-11.jpg": "blue", "blue-7.jpg": "red"}
    rows = [row | {"label": incorrect.get(row["path"], row["label"])} for row in rows]
    (tmp_path / "broken.jpg").write_bytes(red_or_blue("red", 20)[:300])
    (tmp_path / "rare.jpg").write_bytes(red_or_blue("red", 21))
    rows += [{"path": "broken.jpg", "label": "red"}, {"path": "rare.jpg", "label": "<i>crimson</i>"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labels.parquet")
    return str(tmp_path / "labels.parquet"), {f"{tmp_path}/{name}": label for name, label in incorrect.items()}


def test_incorrect_labels_come_first_with_the_correct_ones_suggested(labelled, finished_run, tmp_path):
    table, incorrect = labelled
    lines = []
    config = AuditConfig(labels=table, suspects=str(finished_run.folder), output=str(tmp_path / "out"))
    summary = audit(config, lines.append)
    rows = pq.read_table(tmp_path / "out" / "suspects.parquet").to_pylist()
    assert {row["path"]: row["label"] for row in rows[:3]} == incorrect
    assert all(row["flagged"] and f"/{row['suggested']}-" in row["path"] for row in rows[:3])
    *rated, rare = [row["self_confidence"] for row in rows]
    assert (len(rated), rated) == (30, sorted(rated))
    assert (rare, rows[-1]["label"], rows[-1]["suggested"]) == (None, "<i>crimson</i>", "red")
    flagged = {row["path"] for row in rows if row["flagged"]}
    assert 3 <= len(flagged) < 10
    files = pq.read_table(tmp_path / "out" / "files.parquet").to_pylist()
    assert {row["path"] for row in files if "suspect_label" in row["issues"]} == flagged
    assert summary["by_issue"]["suspect_label"] == len(flagged)
    counts = summary["suspects"]
    assert sum(count.pop("images") for count in counts.pop("by_label")) == len(flagged)
    assert counts == {
        "rated": 30,
        "flagged": len(flagged),
        "without_an_image": 1,
        "classes_not_rated": {"<i>crimson</i>": 1},
        "features": str(finished_run.folder / "best"),
    }
    assert (tmp_path / "out" / "exclude.csv").read_text().count("\n") == 2  # the header, and the broken file
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{len(flagged)} of 30 labels are suspect; {len(flagged)} of them, each beside" in page
    assert "<i>crimson" not in page
    assert any("no other images or groups to compare these classes with" in line for line in lines_of(lines))


def test_an_audit_without_suspects_removes_the_table_of_an_earlier_one(labelled, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "suspects.parquet").write_bytes(b"of an earlier audit")
    summary = audit(AuditConfig(labels=labelled[0], output=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "suspects.parquet").exists()
    assert (summary["suspects"], "suspect_label" in summary["by_issue"]) == (None, False)


def test_classes_without_images_leave_nothing_to_compare(labelled, finished_run, tmp_path):
    for path in tmp_path.glob("*.jpg"):
        path.write_bytes(b"")
    config = AuditConfig(labels=labelled[0], suspects=str(finished_run.folder), output=str(tmp_path / "out"))
    summary = audit(config)
    assert (summary["suspects"], summary["by_status"]) == (None, {"empty": 32})


def test_groups_that_join_all_images_of_a_class_leave_nothing_to_compare(
    labelled, red_blue_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(rating, "load_or_compute_features", lambda run, checkpoint, files, _: features_of(files))
    rows = [row | {"group": row["label"]} for row in pq.read_table(labelled[0]).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), labelled[0])
    config = AuditConfig(labels=labelled[0], suspects=str(red_blue_checkpoint), output=str(tmp_path / "out"))
    assert audit(config)["suspects"] is None


def features_of(files):
    return Features(np.arange(files.num_rows), np.ones((files.num_rows, NUM_FEATURES), np.float32), "by hand")
