"""The speed of catsdogs and of its peers, run in turn: images per second and start-up."""
