"""A generated preference world whose true reward is known, a small model to train on it, and measurements."""
