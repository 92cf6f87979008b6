"""A run and its workers: what is shared out among processes and machines, and what a worker does with it."""
