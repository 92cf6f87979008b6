"""A cell tried before anything trains: what cannot be built is told now."""
