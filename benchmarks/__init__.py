"""Measurements of the package; each prints or writes its own table."""
