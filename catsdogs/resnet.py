"""ResNet50 for training: key names, initialisation and arithmetic of `torchvision.models.resnet50`.

Importing torchvision.models would take 4.7 CPU seconds more (measured: 2-core Zen 4, torchvision 0.29, 2026-11).
He et al. 2015 (arXiv 1512.03385), table 1; the 3x3 convolution of a block has the block's stride.

Shapes: N batch, C channels, H, W, K classes.
"""

import torch
from torch import nn

from catsdogs.checkpoint import HEAD, NUM_FEATURES


class Bottleneck(nn.Module):
    """Three convolutions with BatchNorm; a residual add before the last ReLU."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        # Created first and registered last, as in torchvision: the order of creation determines the random weights.
        downsample = None
        if in_channels != out_channels:
            downsample = nn.Sequential(*_make_conv_and_norm(in_channels, out_channels, 1, stride))
        self.conv1, self.bn1 = _make_conv_and_norm(in_channels, width, 1)
        self.conv2, self.bn2 = _make_conv_and_norm(width, width, 3, stride)
        self.conv3, self.bn3 = _make_conv_and_norm(width, out_channels, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        """Compute the block's outputs, (N, C, H, W)."""
        outputs_NCHW = self.relu(self.bn1(self.conv1(inputs_NCHW)))
        outputs_NCHW = self.relu(self.bn2(self.conv2(outputs_NCHW)))
        outputs_NCHW = self.bn3(self.conv3(outputs_NCHW))
        outputs_NCHW += inputs_NCHW if self.downsample is None else self.downsample(inputs_NCHW)
        return self.relu(outputs_NCHW)  # type: ignore[no-any-return]


class ResNet50(nn.Module):
    """ResNet50; `build_resnet50` initialises its convolutions."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _make_conv_and_norm(3, 64, 7, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _make_layer(64, 64, num_blocks=3, stride=1)
        self.layer2 = _make_layer(256, 128, num_blocks=4, stride=2)
        self.layer3 = _make_layer(512, 256, num_blocks=6, stride=2)
        self.layer4 = _make_layer(1024, 512, num_blocks=3, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Compute logits (N, K) of normalized images (N, 3, H, W)."""
        inputs_NCHW = self.maxpool(self.relu(self.bn1(self.conv1(images_NCHW))))
        outputs_NCHW = self.layer4(self.layer3(self.layer2(self.layer1(inputs_NCHW))))
        return self.fc(self.avgpool(outputs_NCHW).flatten(1))  # type: ignore[no-any-return]


def _make_conv_and_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


def _make_layer(in_channels: int, width: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(in_channels, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(num_blocks - 1)))


def build_resnet50(num_classes: int, seed: int) -> ResNet50:
    """Build a randomly initialised model; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet50(num_classes)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return model


def freeze_backbone(model: ResNet50) -> None:
    """Exclude all parameters but the head's from training."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(f"{HEAD}.")


def set_train_mode(model: ResNet50, num_rows: int) -> None:
    """Set training mode, but evaluation mode for one row, whose variance would spoil BatchNorm's statistics."""
    model.train(num_rows >= 2)


def group_parameters(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Group the trainable parameters for an optimizer: norms and biases (one dimension) have no weight decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
