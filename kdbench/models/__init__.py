"""Networks, their hook points, and the modules between two networks' features."""
