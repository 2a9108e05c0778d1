"""The fault table: what is lost, doubled and wrong when machines, networks and disks misbehave.

Run by `python -m benchmarks.faults`; it writes docs/faults.md.
"""
