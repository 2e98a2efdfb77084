"""All oracles by the id of their loss."""

from collections.abc import Callable

from tests.oracle import batch, contrib, graded, groups, pairs, reference_free, token, votes

MODULES = (pairs, graded, reference_free, batch, token, votes, groups, contrib)

ORACLES: dict[str, Callable] = {
    name: function
    for module in MODULES
    for name, function in vars(module).items()
    if hasattr(function, "reads")
}
