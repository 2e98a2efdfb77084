"""`prefloss score`: the implicit reward of every completion in a file, and what the rewards are worth."""
