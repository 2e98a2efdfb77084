"""What follows from finished sweeps: the verdict, the matrix, reward at a KL, and the page that shows it."""

import csv
import io
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from prefloss.evidence.comparison import compared
from prefloss.evidence.report import Origin, page, rows_of, table
from prefloss.evidence.sweeps import COLUMNS

SEEDS, PROMPTS = 8, 6
ORIGIN = Origin(
    "prefloss compare dpo ipo --output here",
    {"prefloss": "9.9"},
    "cafe",
    "The same for all.",
    {"tis_dpo": ["x"]},
)


def sweep(loss, world, gain, noise=0.02, kl=(0.5, 1.5)):
    """As `run_sweep` gives it, with a reward of 1 + gain on all prompts but for some noise."""
    random = np.random.default_rng(zlib.crc32(f"{loss} in {world}".encode()))
    prompts = 1 + gain + noise * random.normal(size=(SEEDS, PROMPTS))
    rows = [
        {"loss": loss, "world": world, "beta": beta, "seed": seed, **dict.fromkeys(COLUMNS.values(), 0.5)}
        | {"kl": distance, "reward": distance + gain, "chosen_by_validation": beta == 1.0, "findings": "kl"}
        for beta, distance in zip((1.0, 0.1), kl, strict=True)
        for seed in range(SEEDS)
    ]
    samples = [{"prompt": 0, "text": "a .", "probability": 0.5, "reward": 1.0}] * 3
    return {
        "loss": loss,
        "world": world,
        "strengths": [1.0, 0.1],
        "rows": rows,
        "chosen": [0] * SEEDS,
        "prompts": prompts.tolist(),
        "steps": [0, 10],
        "curves": {name: [0.0, 1.0] for name in COLUMNS},
        "samples": samples,
        "seconds": 1.5,
    }


def comparison(gains, worlds=("clean", "flips"), **settings):
    finished = [sweep(loss, world, gain, **settings) for loss, gain in gains.items() for world in worlds]
    return compared(finished, list(gains), worlds)


def test_a_verdict_names_what_is_better_what_is_worse_and_what_is_neither():
    found = comparison({"dpo": 0.0, "ipo": 0.5, "kto": -0.5, "hinge": 0.0})
    assert [found.shown(loss) for loss in ("ipo", "kto", "hinge")] == [1, -1, 0]
    better, worse, neither, resolution = found.verdict
    assert re.fullmatch(
        r"ipo \(\+0\.\d\d\) earns more true reward than dpo in the mean over 2 worlds\.", better
    )
    assert worse.startswith("kto (-0.")
    assert neither == "No difference from dpo is shown for hinge."
    assert resolution.startswith("8 seeds would have shown a difference of about 0.0")
    assert found.ranked[0] == "ipo"
    assert found.ranked[-1] == "kto"


def test_no_difference_is_said_first():
    found = comparison({"dpo": 0.0, "hinge": 0.0, "ipo": 0.0}, noise=1.0)
    expected = "No difference in true reward from dpo is shown in the mean over 2 worlds for hinge or ipo."
    assert found.verdict[0] == expected


def test_the_matrix_compares_seed_by_seed_and_prompt_by_prompt():
    found = comparison({"dpo": 0.0, "ipo": 5.0})
    assert found.better_than.tolist() == [[0.5, 1.0], [0.0, 0.5]]


def test_reward_at_a_kl_is_between_runs_or_not_reached():
    found = comparison({"dpo": 0.25, "ipo": 0.0})
    at_one = found.at_kl("dpo", "clean", 1.0)
    assert at_one.interval == pytest.approx((1.25, 1.25, 1.25))
    assert at_one.reached == SEEDS
    assert found.at_kl("dpo", "clean", 3.0).interval is None
    assert found.reached_kl("clean") == [1.0]


def test_a_loss_with_broken_runs_is_left_out_by_name():
    found = comparison({"dpo": 0.0, "ipo": 0.0})
    found.sweeps["ipo", "clean"]["prompts"][0][0] = None
    assert found.others == ()
    assert found.verdict[-1] == "ipo is left out: a run gave numbers that are not finite (clean)."
    assert "ipo is left out" in page(found, ORIGIN)


class Reader(HTMLParser):
    """Collects what a browser would load, and checks that tags are closed."""

    def __init__(self):
        super().__init__()
        self.loaded, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loaded += [found[name] for name in ("src", "href", "xlink:href") if found.get(name)]
        if tag not in ("meta", "br", "img", "link", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_no_network_and_holds_everything():
    found = comparison({"dpo": 0.0, "ipo": 0.5, "0.8*dpo(beta=0.1) + 0.2*nll": 0.0, "kto(beta=0.3)": -0.4})
    html = page(found, ORIGIN)
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    # Inside the page, or written out in it.
    assert all(address.startswith(("#", "data:")) for address in reader.loaded)
    assert "url(http" not in html
    assert "@import" not in html
    text = " ".join(reader.text)
    order = [
        *found.verdict,
        "True reward over KL",
        "Differences to dpo",
        "How often one beats another",
        "World by world",
    ]
    order += [
        "True reward at equal KL",
        "On the way",
        "What the diagnosis found",
        "Samples side by side",
        "Cost",
    ]
    order += [ORIGIN.command, "cafe", "tis_dpo"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    # 2 frontiers, forest, matrix, 6 curves.
    assert html.count("<svg") == 10
    assert "ipo(tau=0.1, per_token=True)" in text


def test_a_name_with_markup_is_only_text():
    loss = "0.5*dpo(beta=0.1) + 0.5*ipo"
    html = page(comparison({"dpo": 0.0, loss: 0.0}), Origin("a <b> & c", {}, "", "<script>", {}))
    assert "<script>" not in html
    assert "a &lt;b&gt; &amp; c" in html


def test_many_losses_are_drawn_in_part_and_listed_in_full():
    names = [
        "dpo",
        "ipo",
        "hinge",
        "ln_dpo",
        "r_dpo",
        "hdpo",
        "dpo_nll",
        "xpo",
        "aot",
        "dr_dpo",
        "kto_pair",
        "sppo",
    ]
    found = comparison({name: place / 10 for place, name in enumerate(names)}, worlds=("clean",))
    html = page(found, ORIGIN)
    assert "the four highest and the three lowest" in html
    assert all(f"<td>{name}</td>" in html for name in names)


def test_one_row_a_run():
    found = comparison({"dpo": 0.0, "ipo": 0.5})
    rows = list(csv.DictReader(io.StringIO(table(rows_of(found)))))
    assert len(rows) == 2 * 2 * 2 * SEEDS
    assert list(rows[0])[:4] == ["loss", "world", "beta", "seed"]
    assert {"reward", "kl", "accuracy", "length", "chosen_drift", "rejected_drift"} <= set(rows[0])
