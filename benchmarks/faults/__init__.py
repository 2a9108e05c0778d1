"""The fault table: rows that are lost, doubled or wrong when machines, networks and disks fail.

`python -m benchmarks.faults` runs it and writes docs/faults.md.
"""
