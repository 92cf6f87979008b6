"""Networks of specs: built, given weights, run with hooks, and exported."""
