"""Predict the labels of images by heads that were not trained on them: one head for each fold, on fixed features.

The heads are multinomial logistic regressions on standardized features with weight decay. All are fitted at once, by
L-BFGS: one pass over the features gives the loss and the gradient of every head. So the features may be a
memory-mapped file, of which a chunk is in memory at a time.

Shapes: N images, D features, F folds, K classes, B rows of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from catsdogs.auditing.folds import NUM_FOLDS, IndexArray

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
UNKNOWN = -1  # the label of an image that no head is trained on
CHUNK_ROWS = 4096
# Of the mean loss, from strong to weak; the best depends on the number of images: 0.3 for 2,000.
WEIGHT_DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
MAX_ITERATIONS = 200
MAX_GRADIENT = 1e-3  # divided by the number of classes; smaller ones changed no ranking


def predict_out_of_sample(
    features_ND: FloatArray, labels_N: IndexArray, folds_N: IndexArray, num_classes: int
) -> DoubleArray:
    """Compute each image's probabilities, (N, K), by the head that is trained on the other folds.

    The weight decay is the one with the lowest out-of-sample log loss: it is lowered until the loss grows.

    Args:
        labels_N: UNKNOWN for images that are only predicted.
    """
    heads = _FoldHeads.build(features_ND, labels_N, folds_N, num_classes)
    parameters = np.zeros((features_ND.shape[1] + 1, NUM_FOLDS * num_classes))
    best_probs_NK, best_loss = np.empty(0), np.inf
    known = np.flatnonzero(labels_N != UNKNOWN)
    for weight_decay in WEIGHT_DECAYS:
        parameters = heads.fit(parameters, weight_decay)
        probs_NK = heads.predict(parameters)
        loss = -np.log(np.maximum(probs_NK[known, labels_N[known]], np.finfo(np.float64).tiny)).mean()
        if loss >= best_loss:
            break
        best_probs_NK, best_loss = probs_NK, loss
    return best_probs_NK


@dataclass(frozen=True)
class _FoldHeads:
    """The heads of all folds; their parameters are float64 (D + 1, F * K), for standardized features and a bias.

    Attributes:
        weights_NF: of each image in the loss of each head; 0 in its own fold.
    """

    features_ND: FloatArray
    labels_N: IndexArray
    folds_N: IndexArray
    num_classes: int
    mean_D: DoubleArray
    std_D: DoubleArray
    weights_NF: FloatArray

    @classmethod
    def build(
        cls, features_ND: FloatArray, labels_N: IndexArray, folds_N: IndexArray, num_classes: int
    ) -> "_FoldHeads":
        is_training_NF = (folds_N[:, None] != np.arange(NUM_FOLDS)) & (labels_N != UNKNOWN)[:, None]
        weights_NF = (is_training_NF / np.maximum(1, is_training_NF.sum(axis=0))).astype(np.float32)
        mean_D, std_D = _measure(features_ND)
        return cls(features_ND, labels_N, folds_N, num_classes, mean_D, std_D, weights_NF)

    def fit(self, parameters: DoubleArray, weight_decay: float) -> DoubleArray:
        """Fit all heads, starting from the given parameters."""
        result = minimize(
            lambda flat: self._compute_loss(flat.reshape(parameters.shape), weight_decay),
            parameters.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_ITERATIONS, "gtol": MAX_GRADIENT / self.num_classes, "ftol": 0},
        )
        return np.asarray(result.x).reshape(parameters.shape)

    def _compute_loss(self, parameters: DoubleArray, weight_decay: float) -> tuple[float, DoubleArray]:
        """Compute the sum of the heads' losses, and its gradient."""
        weights_DM = parameters[:-1]
        loss = 0.5 * weight_decay * float(np.sum(weights_DM**2))
        gradient = np.zeros_like(parameters)
        for rows, logits_BFK in self._iter_logits(parameters):
            log_probs_BFK = logits_BFK - _log_sum_exp(logits_BFK)
            weights_BF = self.weights_NF[rows]
            label_BF1 = np.broadcast_to(np.maximum(self.labels_N[rows], 0)[:, None, None], (*weights_BF.shape, 1))
            loss -= float(np.sum(weights_BF * np.take_along_axis(log_probs_BFK, label_BF1, axis=2)[..., 0]))
            errors_BFK = np.exp(log_probs_BFK)
            np.put_along_axis(errors_BFK, label_BF1, np.take_along_axis(errors_BFK, label_BF1, axis=2) - 1, axis=2)
            errors_BM = (errors_BFK * weights_BF[..., None]).reshape(len(label_BF1), -1)
            gradient[:-1] += self.features_ND[rows].T @ errors_BM
            gradient[-1] += errors_BM.sum(axis=0)
        gradient[:-1] = (gradient[:-1] - self.mean_D[:, None] * gradient[-1]) / self.std_D[:, None]
        gradient[:-1] += weight_decay * weights_DM
        return loss, gradient.ravel()

    def _iter_logits(self, parameters: DoubleArray) -> Iterator[tuple[slice, FloatArray]]:
        """Yield the rows of each chunk, and their logits by every head.

        Instead of the features, the weights are standardized: the features need no copy.
        """
        weights_DM = parameters[:-1] / self.std_D[:, None]
        bias_M = (parameters[-1] - self.mean_D @ weights_DM).astype(np.float32)
        weights_DM = weights_DM.astype(np.float32)
        for rows in iter_chunks(len(self.features_ND)):
            logits_BM = self.features_ND[rows] @ weights_DM + bias_M
            yield rows, logits_BM.reshape(-1, NUM_FOLDS, self.num_classes)

    def predict(self, parameters: DoubleArray) -> DoubleArray:
        """Compute the probabilities of each image by the head of its fold."""
        probs_NK = np.empty((len(self.features_ND), self.num_classes))
        for rows, logits_BFK in self._iter_logits(parameters):
            logits_BK = logits_BFK[np.arange(len(logits_BFK)), self.folds_N[rows]].astype(np.float64)
            probs_NK[rows] = np.exp(logits_BK - _log_sum_exp(logits_BK))
        return probs_NK


def iter_chunks(num_rows: int) -> Iterator[slice]:
    """Yield the rows of each chunk."""
    return (slice(start, min(start + CHUNK_ROWS, num_rows)) for start in range(0, num_rows, CHUNK_ROWS))


def _log_sum_exp(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Compute log(sum(exp(x))) over the last axis, which is kept."""
    highest = logits.max(axis=-1, keepdims=True)
    return np.asarray(highest + np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True)))


def _measure(features_ND: FloatArray) -> tuple[DoubleArray, DoubleArray]:
    """Compute the mean and the standard deviation of each feature; 1 instead of that of a constant one."""
    num_rows = len(features_ND)
    mean_D, variance_D = np.zeros(features_ND.shape[1]), np.zeros(features_ND.shape[1])
    for rows in iter_chunks(num_rows):
        mean_D += features_ND[rows].sum(axis=0, dtype=np.float64) / num_rows
    for rows in iter_chunks(num_rows):
        variance_D += np.square(features_ND[rows] - mean_D).sum(axis=0) / num_rows
    return mean_D, np.sqrt(np.where(variance_D > 0, variance_D, 1.0))
