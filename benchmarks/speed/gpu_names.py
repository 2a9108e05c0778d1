"""The figures of the GPU's page that others are compared with."""

SCORE_RATE = "`catsdogs score`, decoding on the GPU, img/s"
LOADER_RATE = "torch DataLoader, tuned, img/s"
TRAIN_RATE = "`catsdogs train`, all layers, img/s from the second epoch"
TRAIN32_RATE = "`catsdogs train`, batches of 32, img/s from the second epoch"
EAGER32_RATE = "a training step in eager fp32, batches of 32, img/s"
