"""Ours and the peers, run in turn: how many images a second, and what start-up takes."""
