"""Machinery of the losses: specs, hyperparameters, expressions, modifiers, states, registry."""
