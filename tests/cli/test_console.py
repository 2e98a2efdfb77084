"""The screen while a run goes on."""

import io

import pytest
from rich.console import Console

from prefloss.cli.console import Screen, sparkline
from prefloss.demo.measure import Measurement

BEFORE = Measurement(0, reward=0.1, kl=0.0, accuracy=0.5, chosen=0.0, rejected=0.0)
AFTER = Measurement(9, reward=3.0, kl=2.0, accuracy=0.75, chosen=-1.0, rejected=-4.0)


def test_a_sparkline_spans_its_values():
    assert sparkline([0.0, 1.0, 2.0]) == "▁▅█"
    assert sparkline([3.0, 3.0]) == "▁▁"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_screen_shows_every_measurement(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)
    with Screen(console) as screen:
        update = screen.stage("dpo", 9)
        screen.measured(BEFORE)
        update(9, "loss 0.1")
        screen.measured(AFTER)
    text = console.file.getvalue()
    assert "+3.00" in text
    assert ("▁█" in text) is terminal
    assert ("step    9: reward +3.00, KL 2.00, accuracy 75.0%" in text) is not terminal
