"""The oracle: every loss once more, written from its paper in mpmath, on plain numbers at 50 digits.

An oracle answers one question: is the number that prefloss computes the number that the paper defines? Its worth is
independence, and one rule keeps it: nothing here imports prefloss or torch, and nobody writes an oracle with the
package's code at hand. An oracle is written from the paper, from the authors' code or from a write-up of either, and
its docstring says which of these was read ("Read in ...") or that none was ("Not verified"). Where package and oracle
differ, go back to the source; never make one agree with the other.

Two more habits. Hyperparameters have no defaults: the caller passes all of them, so a wrong default shows in the
caller. And formulas stay as the paper prints them: 50 digits forgive what float32 does not, and the few functions of
`numbers` that take care (log1p, expm1) keep relative accuracy for arguments up to 1e4 and beyond.
"""
