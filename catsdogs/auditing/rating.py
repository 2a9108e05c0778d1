"""Rate labels by heads that were trained on other images.

    load_or_compute_features()           features.py             once for each image
    join_groups(), assign_folds()        folds.py                groups and duplicates are in one fold
    predict_out_of_sample()              heads.py                probabilities of each image
    rate_labels()                        confident_learning.py   which labels are flagged

Shapes: N labelled images with features, K classes of all labels, S flagged labels that are shown.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs.auditing.confident_learning import LabelQuality, rate_labels
from catsdogs.auditing.features import load_or_compute_features
from catsdogs.auditing.folds import IndexArray, assign_folds, join_groups, number_from_zero
from catsdogs.auditing.heads import UNKNOWN, FloatArray, iter_chunks, predict_out_of_sample
from catsdogs.auditing.pairs import NO_CONTENT, Pairs
from catsdogs.auditing.sets import AuditedSets, MeasuredFiles
from catsdogs.auditing.suspects import MIN_FOLDS, SUSPECTS, Example, Suspects, list_ratable
from catsdogs.checkpoint import CheckpointFiles
from catsdogs.progress import Message, Progress
from catsdogs.schema import FILES, OK
from catsdogs.text import format_names

MAX_SHOWN = 12  # suspects in the report


def find_suspects(
    run: str, checkpoint: CheckpointFiles, sets: AuditedSets, measured: MeasuredFiles, pairs: Pairs, progress: Progress
) -> Suspects | None:
    """Compare each label with the probabilities of a head that was trained on other images.

    Returns:
        None if fewer than two classes can be rated.

    Raises:
        RunError: the features could not be loaded or computed.
    """
    files = measured.audited
    is_labelled_N = pc.is_valid(files["label"]).to_numpy()
    labelled = np.flatnonzero(is_labelled_N & pc.equal(files["status"], OK).to_numpy())
    if len(list_ratable(files["label"].take(pa.array(labelled)))) < 2:
        progress(Message("fewer than two classes have images enough to compare their labels"))
        return None
    listed = sets.files.select(FILES.names).take(pa.array(labelled))
    features = load_or_compute_features(run, checkpoint, listed, progress)
    rows_N = labelled[features.rows_N]
    names, labels_N = _number_labels(files["label"].take(pa.array(rows_N)))
    folds_N = assign_folds(labels_N, number_from_zero(_join_groups(files, pairs)[rows_N]))
    is_rated_K = np.array([len(np.unique(folds_N[labels_N == k])) >= MIN_FOLDS for k in range(len(names))], dtype=bool)
    unrated = {name: int((labels_N == k).sum()) for k, name in enumerate(names) if not is_rated_K[k]}
    if unrated:
        progress(Message(f"no other images or groups to compare these classes with: {format_names([*unrated])}"))
    if is_rated_K.sum() < 2:
        return None
    progress(Message(f"comparing {len(labels_N):,} labels with predictions from other images"))
    quality = _rate(features.features_ND, labels_N, folds_N, is_rated_K)
    order_N = np.argsort(quality.self_confidence_N, kind="stable")  # NaN is last
    return Suspects(
        table=_build_table(files["path"].take(pa.array(rows_N)), names, labels_N, quality).take(pa.array(order_N)),
        rows_N=rows_N[order_N],
        examples=_find_examples(features.features_ND, labels_N, quality, rows_N, order_N),
        unrated=unrated,
        num_left_out=int(is_labelled_N.sum()) - len(rows_N),
        source=features.source,
    )


def _number_labels(labels: pa.ChunkedArray) -> tuple[list[str], IndexArray]:
    names = sorted(labels.unique().to_pylist())
    return names, pc.index_in(labels, pa.array(names, pa.string())).to_numpy().astype(np.int64)


def _join_groups(files: pa.Table, pairs: Pairs) -> IndexArray:
    """Number groups of the audited files: images of one group, and equal ones.

    Not near duplicates: a chain of them may have most images of a set of similar ones.
    """
    content_N = pairs.content_N[: len(files)]
    return join_groups(files["group"].combine_chunks(), pa.array(content_N, mask=content_N == NO_CONTENT))


def _rate(
    features_ND: FloatArray, labels_N: IndexArray, folds_N: IndexArray, is_rated_K: npt.NDArray[np.bool_]
) -> LabelQuality:
    """Rate the labels; images of classes that are not rated are predicted only, with NaN as self-confidence."""
    rated = np.flatnonzero(is_rated_K)
    number_K = np.full(len(is_rated_K), UNKNOWN)
    number_K[rated] = np.arange(len(rated))
    probs_NK = predict_out_of_sample(features_ND, number_K[labels_N], folds_N, len(rated))
    self_confidence_N, flagged_N = np.full(len(labels_N), np.nan), np.zeros(len(labels_N), dtype=np.bool_)
    suggested_N = rated[probs_NK.argmax(axis=1)]
    rows = np.flatnonzero(is_rated_K[labels_N])
    quality = rate_labels(number_K[labels_N[rows]], probs_NK[rows])
    self_confidence_N[rows], flagged_N[rows] = quality.self_confidence_N, quality.flagged_N
    suggested_N[rows] = rated[quality.suggested_N]
    return LabelQuality(self_confidence_N, suggested_N, flagged_N)


def _build_table(paths: pa.ChunkedArray, names: list[str], labels_N: IndexArray, quality: LabelQuality) -> pa.Table:
    class_names = pa.array(names, pa.string())
    columns = [
        paths,
        class_names.take(pa.array(labels_N)),
        class_names.take(pa.array(quality.suggested_N)),
        pa.array(quality.self_confidence_N, from_pandas=True),  # null for NaN
        pa.array(quality.flagged_N),
    ]
    return pa.table(columns, schema=SUSPECTS)


def _find_examples(
    features_ND: FloatArray, labels_N: IndexArray, quality: LabelQuality, rows_N: IndexArray, order_N: IndexArray
) -> list[Example]:
    """Find similar images by the cosine of the features."""
    flagged_S = order_N[quality.flagged_N[order_N]][:MAX_SHOWN]
    cosine_NS = np.empty((len(labels_N), len(flagged_S)), dtype=np.float32)
    for rows in iter_chunks(len(labels_N)):
        lengths_N1 = np.linalg.norm(features_ND[rows], axis=1, keepdims=True)
        cosine_NS[rows] = features_ND[rows] @ features_ND[flagged_S].T / np.maximum(lengths_N1, 1e-12)
    is_candidate_NS = (labels_N[:, None] == quality.suggested_N[flagged_S]) & ~quality.flagged_N[:, None]
    similar_S = np.where(is_candidate_NS, cosine_NS, -np.inf).argmax(axis=0)
    return [
        Example(int(rows_N[i]), int(rows_N[similar]), float(quality.self_confidence_N[i]))
        for i, similar, is_candidate_N in zip(flagged_S, similar_S, is_candidate_NS.T, strict=True)
        if is_candidate_N.any()
    ]
