"""Worlds whose truth is known: small enough to enumerate, so that reward, KL and the best policy are exact.

Example:
    >>> world = bandit(completions=20)
    >>> data = draw(world, Judge(), Pairs, 200, seeds=range(3))
    >>> runs = train(Tabular(world), data, sweep("dpo", [0.5, 1.0]), steps=50)
    >>> measure(world, runs.log_probs())["reward"].shape  # losses, seeds
    torch.Size([2, 3])
"""

from prefloss.worlds.ascent import climb as climb
from prefloss.worlds.data import Data as Data
from prefloss.worlds.data import best_and_worst as best_and_worst
from prefloss.worlds.data import draw as draw
from prefloss.worlds.data import listed as listed
from prefloss.worlds.data import population as population
from prefloss.worlds.exact import accuracy as accuracy
from prefloss.worlds.exact import drift as drift
from prefloss.worlds.exact import expected as expected
from prefloss.worlds.exact import frontier as frontier
from prefloss.worlds.exact import kl as kl
from prefloss.worlds.exact import length as length
from prefloss.worlds.exact import measure as measure
from prefloss.worlds.exact import optimum as optimum
from prefloss.worlds.exact import reward as reward
from prefloss.worlds.exact import win_rate as win_rate
from prefloss.worlds.feeding import fed as fed
from prefloss.worlds.judges import Judge as Judge
from prefloss.worlds.judges import Panel as Panel
from prefloss.worlds.policies import LogLinear as LogLinear
from prefloss.worlds.policies import Policy as Policy
from prefloss.worlds.policies import Tabular as Tabular
from prefloss.worlds.policies import TokenTable as TokenTable
from prefloss.worlds.settings import Setting as Setting
from prefloss.worlds.settings import settings as settings
from prefloss.worlds.training import Runs as Runs
from prefloss.worlds.training import scaled as scaled
from prefloss.worlds.training import sweep as sweep
from prefloss.worlds.training import train as train
from prefloss.worlds.world import World as World
from prefloss.worlds.world import bandit as bandit
from prefloss.worlds.world import featured as featured
from prefloss.worlds.world import spelled as spelled
