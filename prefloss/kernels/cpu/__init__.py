"""Compiled C for what PyTorch lacks on a CPU."""
