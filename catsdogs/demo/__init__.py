"""`catsdogs demo`: the whole job on pictures that it draws."""

from catsdogs.demo.run import demo

__all__ = ["demo"]
