"""Measurements of the package; each prints its results or writes them to a page of docs/."""
