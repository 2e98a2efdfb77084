"""A small model, its warm start, and what a training run did to it, measured in a world or on held-out data."""
