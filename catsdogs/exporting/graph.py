"""The graph of an exported model: uint8 images to probabilities, with everything between inside.

Shapes: N batch, H, W of the images, S pixels a side of the model's input, R resized sides, K classes.
"""

from collections.abc import Mapping

import torch
from torch import nn

from catsdogs.calibration import MIN_PROB
from catsdogs.images import Preprocessing
from catsdogs.resnet import ResNet50

# torch's resizing of uint8 images uses weights of 16 bits: as many of them after the binary point as fit for the
# largest weight, and at most 22.
MAX_PRECISION, WEIGHT_LIMIT = 22, 1 << 15


class ResizeAndCrop(nn.Module):
    """Resize the short side and crop the centre, with the pixels of `Preprocessing`, in operators that ONNX has.

    A triangle filter with antialias, first over the width, then over the height, each rounded to whole levels: the
    arithmetic of torch's `interpolate` for uint8 (aten/src/ATen/native/cpu/UpSampleKernel.cpp).
    """

    powers: torch.Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self._resize_size, self._size = preprocessing.resize_size, preprocessing.img_size
        self.register_buffer("powers", 2.0 ** torch.arange(1, MAX_PRECISION + 1, dtype=torch.float64), persistent=False)

    def forward(self, images_NHWC: torch.Tensor) -> torch.Tensor:
        """Resize and crop uint8 images of one size, at least 1 pixel; float32 (N, 3, S, S) of whole numbers."""
        _, height, width, _ = images_NHWC.shape
        short: int = torch.sym_min(height, width)  # type: ignore[assignment]  # a SymInt while the graph is traced
        weights_SW, unit = self._compute_weights(width, self._resize_size * width // short)
        pixels_NCHS = _round(images_NHWC.permute(0, 3, 1, 2).double() @ weights_SW.T, unit)
        weights_SH, unit = self._compute_weights(height, self._resize_size * height // short)
        return _round(weights_SH @ pixels_NCHS, unit).float()

    def _compute_weights(self, length: int, resized_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the weights of each pixel in each of the S pixels of the crop, whole numbers; and the unit.

        The unit depends on the largest weight of all pixels. That of an enlarged image is 1, of its first pixel: a
        strip of 1 x 1,000 pixels, resized to 232 x 232,000, needs no weights of the others.
        """
        scale = torch.full((), length, dtype=torch.float64) / resized_length
        excess = resized_length - self._size
        start = (excess + excess // 2 % 2) // 2  # half of it, rounded to even
        weights_SL = _weigh_pixels(torch.arange(self._size, dtype=torch.float64) + start, length, scale)
        # More than 1, which a traced graph would take for a special case.
        num_rows: int = torch.sym_min(length + 1, resized_length)  # type: ignore[assignment]  # as above
        weights_RL = _weigh_pixels(torch.arange(num_rows, dtype=torch.float64), length, scale)
        precision = ((weights_RL.max() * self.powers + 0.5).floor() < WEIGHT_LIMIT).sum()
        unit = 2.0 ** precision.double()
        return (weights_SL * unit + 0.5).floor(), unit


def _weigh_pixels(resized_R: torch.Tensor, length: int, scale: torch.Tensor) -> torch.Tensor:
    """Compute the weights of a row of pixels in each of the given pixels of the resized row, (R, length)."""
    centre_R1 = ((resized_R + 0.5) * scale)[:, None]
    pixel_L = torch.arange(length, dtype=torch.float64) + 0.5
    weights_RL = (1 - ((pixel_L - centre_R1) / scale.clamp(min=1.0)).abs()).clamp(min=0.0)
    return weights_RL / weights_RL.sum(dim=1, keepdim=True)


def _round(values: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Divide by the unit and round to levels of 8 bits."""
    return ((values + unit / 2) / unit).floor().clamp(0, 255)


class ExportedModel(nn.Module):
    """uint8 images to calibrated probabilities."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor],
        preprocessing: Preprocessing,
        temperature: float,
        dtype: torch.dtype,
        with_resize: bool,
    ) -> None:
        super().__init__()
        self._resize = ResizeAndCrop(preprocessing) if with_resize else None
        self._temperature, self._dtype = temperature, dtype
        mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
        self.register_buffer("mean", mean_C11 * 255, persistent=False)
        self.register_buffer("std", std_C11 * 255, persistent=False)
        self._model = ResNet50(len(state_dict["fc.bias"]))
        self._model.load_state_dict(state_dict, strict=False)  # BatchNorm's batch counters may be missing
        self._model.to(dtype)
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute probabilities.

        Args:
            images: uint8 (N, S, S, 3), RGB; with resizing (N, H, W, 3).

        Returns:
            float32 (N, K); rows sum to 1.
        """
        pixels_NCHW = images.permute(0, 3, 1, 2).float() if self._resize is None else self._resize(images)
        inputs_NCHW = (pixels_NCHW - self.mean) / self.std
        logits_NK: torch.Tensor = self._model(inputs_NCHW.to(self._dtype)).float()
        if self._temperature == 1:
            return logits_NK.softmax(dim=1)
        # As `calibration.scale_probs`: from probabilities of float32, where a large difference of logits is lost.
        log_probs_NK = logits_NK.softmax(dim=1).clamp(min=float(MIN_PROB)).log()
        return (log_probs_NK / self._temperature).softmax(dim=1)
