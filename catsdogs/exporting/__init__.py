"""A checkpoint as a graph for other programs; `pipeline.py` shows the stages. No Ray.

api.py        export(), which imports the rest
pipeline.py   export(): builds the graph, checks it on reference images, writes the files
graph.py      the modules of the graph
formats.py    graph to the bytes of a format, and back to run them
"""

from catsdogs.exporting.api import export

__all__ = ["export"]
