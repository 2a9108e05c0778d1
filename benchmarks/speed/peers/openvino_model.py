"""OpenVINO's runtime on one batch again and again: its defaults for this CPU; tuned: bf16 and its throughput mode.

uint8 images (N, H, W, C) are its input, as of our model alone: its preprocessing normalizes them.
https://docs.openvino.ai/2026/openvino-workflow/running-inference/optimize-inference/high-level-performance-hints.html
"""

import numpy as np
import openvino as ov
import openvino.properties.hint as hints
import torch
from openvino.preprocess import PrePostProcessor

from benchmarks.speed.batch_report import report_batch
from benchmarks.speed.peers.torchvision_model import MEAN, STD, load_model
from benchmarks.speed.protocol import BATCH_SIZE, parse_arguments

NUM_BATCHES = 16
SHAPE = (BATCH_SIZE, 224, 224, 3)
TUNED = {hints.inference_precision: ov.Type.bf16, hints.performance_mode: hints.PerformanceMode.THROUGHPUT}


def convert_model(checkpoint: str) -> ov.Model:
    """Convert the weights with their preprocessing."""
    network = torch.nn.Sequential(load_model(checkpoint), torch.nn.Softmax(dim=1)).eval()
    model = ov.convert_model(network, example_input=torch.zeros(1, 3, 224, 224), input=[(BATCH_SIZE, 3, 224, 224)])
    steps = PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    convert = steps.input().preprocess().convert_element_type(ov.Type.f32)
    convert.mean([255 * mean for mean in MEAN]).scale([255 * std for std in STD])
    return steps.build()


def main() -> None:
    """Classify the batch `NUM_BATCHES` times, in as many requests at once as the mode has."""
    options = parse_arguments()
    compiled = ov.compile_model(convert_model(options.checkpoint), "CPU", TUNED if options.tuned else {})
    print(compiled.get_property(hints.inference_precision))
    images_NHWC = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    requests = ov.AsyncInferQueue(compiled)
    for _ in range(len(requests)):
        requests.start_async(images_NHWC)
    requests.wait_all()
    report_batch(len(requests) * BATCH_SIZE)  # the first batches start and end together
    requests.set_callback(lambda *_: report_batch(BATCH_SIZE))
    for _ in range(NUM_BATCHES):
        requests.start_async(images_NHWC)
    requests.wait_all()


if __name__ == "__main__":
    main()
