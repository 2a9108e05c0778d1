"""Each peer as in its own documentation, and tuned by an expert."""
