"""`catsdogs demo`: the whole job on images that it draws."""

from catsdogs.demo.drawings import ANIMALS, draw_dataset
from catsdogs.demo.run import demo, draw_unlabelled

__all__ = ["ANIMALS", "demo", "draw_dataset", "draw_unlabelled"]
