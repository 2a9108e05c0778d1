"""`catsdogs demo`: the whole job on images that it draws."""

from catsdogs.demo.drawings import OTHER_KINDS, draw_dataset
from catsdogs.demo.run import demo, draw_unlabelled

__all__ = ["OTHER_KINDS", "demo", "draw_dataset", "draw_unlabelled"]
