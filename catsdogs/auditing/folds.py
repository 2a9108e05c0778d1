"""Folds of labelled images for cross-validation: stratified by class, and a group is in one fold only.

Shapes: N images, G groups.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

IndexArray = npt.NDArray[np.int64]
NUM_FOLDS = 5
SEED = 0


def join_groups(*keys: pa.Array, pairs: tuple[IndexArray, IndexArray] | None = None) -> IndexArray:
    """Number groups of images, (N,): images that share a key are in one group, and so on over all keys.

    Args:
        keys: columns of N values, such as the name of a group or a hash of the content; null is shared with none.
        pairs: rows of images that are in one group, too.
    """
    num_images = num_nodes = len(keys[0])
    edges = [pairs] if pairs else []  # of a graph of images and keys
    for column in keys:
        encoded = column.dictionary_encode()
        rows = np.flatnonzero(encoded.indices.is_valid())
        edges.append((rows, num_nodes + encoded.indices.drop_null().to_numpy().astype(np.int64)))
        num_nodes += len(encoded.dictionary)
    ends = tuple(np.concatenate(side) for side in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(num_nodes, num_nodes))
    _, component_N = connected_components(graph, directed=False)
    return number_from_zero(component_N[:num_images])


def number_from_zero(values_N: IndexArray) -> IndexArray:
    """Replace values by numbers from 0, in their order."""
    return np.unique(values_N, return_inverse=True)[1].astype(np.int64)


def assign_folds(labels_N: IndexArray, groups_N: IndexArray) -> IndexArray:
    """Assign images to NUM_FOLDS folds, (N,); the same images with the same labels always get the same folds.

    The largest groups come first. Each goes to the fold with the smallest share of the classes of its images.
    """
    num_images_K = np.bincount(labels_N)
    num_images_KF = np.zeros((len(num_images_K), NUM_FOLDS), dtype=np.int64)
    images_by_group = np.split(np.argsort(groups_N, kind="stable"), np.cumsum(np.bincount(groups_N))[:-1])
    shuffled = np.random.default_rng(SEED).permutation(len(images_by_group))
    folds_N = np.empty(len(labels_N), dtype=np.int64)
    for group in sorted(shuffled, key=lambda group: -len(images_by_group[group])):
        labels = labels_N[images_by_group[group]]
        shares_F = (num_images_KF[labels] / num_images_K[labels, None]).sum(axis=0)
        fold = np.lexsort((num_images_KF.sum(axis=0), shares_F))[0]
        np.add.at(num_images_KF, (labels, fold), 1)
        folds_N[images_by_group[group]] = fold
    return folds_N
