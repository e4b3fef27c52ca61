"""The hot loops that libraries do not do well enough on a CPU."""
