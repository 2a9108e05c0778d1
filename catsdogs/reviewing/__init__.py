"""Pick what a person should look at next, and write a page to label it on.

api.py        review(), which imports the rest
pipeline.py   review(): picks rows, decodes their images, writes the files
picks.py      the strategies, and which images look alike
"""

from catsdogs.reviewing.api import review

__all__ = ["review"]
