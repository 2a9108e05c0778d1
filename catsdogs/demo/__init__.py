"""`catsdogs demo`: the whole job on images that it draws."""

from catsdogs.demo.run import demo

__all__ = ["demo"]
