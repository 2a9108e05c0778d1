"""On PYTHONPATH of a run: the one marked PNG goes to torchvision's decoder, which its damage kills with SIGSEGV."""

from PIL import PngImagePlugin

MARK = b"catsdogs-poison"
_open = PngImagePlugin.PngImageFile._open


def _open_or_die(self):
    start = self.fp.tell()
    content = self.fp.read()
    self.fp.seek(start)
    if MARK in content:
        import torch
        import torchvision.io  # noqa: F401 registers torch.ops.image

        torch.ops.image.decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), 3)
    _open(self)


PngImagePlugin.PngImageFile._open = _open_or_die
