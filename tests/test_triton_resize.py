"""The kernel that resizes a batch on GPUs, run by Triton's interpreter on a CPU, compared with torch's operators."""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPARE = """
import torch
from catsdogs.images.tensors import crop_centre, resize_one_by_one
from catsdogs.images.triton_resize import resize_batch

SIZES = [(40, 60), (67, 41), (17, 23), (36, 36), (5, 150), (1, 40), (40, 1), (1, 1), (90, 61)]  # height, width
generator = torch.Generator().manual_seed(0)
images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in SIZES]
views = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1)[:, height // 4 :, width // 3 :]
         for image, (height, width) in zip(images, SIZES)]
for short_side, size, some, flipped in (
    (19, 18, images, False), (17, 9, images[4:7], True), (41, 40, images[2:3], False), (28, 24, views[2:4], True)
):
    resizes = [crop_centre(image, short_side, size)._replace(flipped=flipped) for image in some]
    expected, found = resize_one_by_one(resizes, size), resize_batch(resizes, size)
    assert found.shape == expected.shape == (len(some), size, size, 3)
    worst = (found.int() - expected.int()).abs().amax(dim=(1, 2, 3))
    assert worst.max() <= 1, worst
    assert expected.float().std() > 30
"""
COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from catsdogs.images.triton_resize import resize_kernel

pointers = {"geometry": "*i64", "views": "*u8"}
constants = {"size": 224, "block": 64}
source = ASTSource(resize_kernel, pointers | dict.fromkeys(constants, "constexpr"), constants)
for capability in (80, 90, 100):  # A100; H100 and H200; B200
    assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch brings triton on Linux only")


def run(code, **variables):
    environment = os.environ | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr


def test_the_kernel_computes_what_torch_computes():
    run(COMPARE, TRITON_INTERPRET="1")


def test_the_kernel_compiles_for_the_gpus_that_decode_jpegs(tmp_path):
    run(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
