"""Machinery of the losses. Each module imports only from those above it in this list.

- `maths`, `transforms`: formulas that several losses share, on numbers and on feedback.
- `state`: what a loss keeps between calls; schedules.
- `parameters`: types and ranges of hyperparameters.
- `running`: running statistics and random draws, as hyperparameters.
- `names`: names that several papers share.
- `problems`: what goes wrong in preference training, in one word each.
- `docstring`, `spec`: what a loss is, read from its signature and docstring.
- `catalogue`: the table of losses; register one, look one up.
- `modifiers`: changes that many losses admit, such as label smoothing.
- `loss`, `weighted_sum`: a loss with its hyperparameters; a sum of several.
- `expression`: losses written as text; `get`.
- `question`, `chooser`: which loss for which data and problem; `suggest`.
"""
