"""Our own stages without Ray, and alone: what Ray costs, and the limits."""
