"""What the papers claim, tried in worlds whose truth is known, and losses compared with the uncertainty stated."""

from prefloss.evidence.experiment import Experiment as Experiment
from prefloss.evidence.experiment import Figure as Figure
from prefloss.evidence.experiment import Finding as Finding
from prefloss.evidence.experiment import Verdict as Verdict
