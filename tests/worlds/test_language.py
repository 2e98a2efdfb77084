"""The generated world: its reward, its judge, its draws."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloss.worlds import language
from prefloss.worlds.language import LanguageWorld, judge_ceiling, topic_of, true_reward, win_probability

SEA = "Tell me about the sea:"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (" Gladly, the wave meets the shore. Thanks!", 4.0),
        (" The wave is quiet.", 1.0),
        (" The oven is quiet.", 0.0),
        # The third on-topic word is the last that counts, the second polite one too.
        (" The wave meets the tide and the ship meets the shore.", 3.0),
        (" Please, the oven is old. Thanks, friend!", 2.0),
        # A noun that comes again costs 1, and counts as on the topic once.
        (" The wave meets the wave.", 0.0),
        (" Ugh, the oven meets the oven. Whatever, fool!", -5.0),
        # On the topic of another prompt.
        (" The oak meets the moss.", 0.0),
        ("", 0.0),
    ],
)
def test_true_reward_by_hand(completion, reward):
    assert true_reward(SEA, completion) == reward


@given(st.text())
def test_true_reward_is_bounded_for_any_text(text):
    assert language.WORST_REWARD <= true_reward(SEA, text) <= language.BEST_REWARD


def test_the_best_reward_can_be_had():
    assert (
        true_reward(SEA, " Gladly, the wave meets the tide and the ship is near. Thanks!")
        == language.BEST_REWARD
        == 5
    )


def test_topics_share_no_words_with_each_other_or_with_manners():
    nouns = [noun for nouns in language.TOPICS.values() for noun in nouns]
    others = [*language.TOPICS, *language.POLITE, *language.RUDE, *language.ADJECTIVES, *language.VERBS]
    assert len({*nouns, *others}) == len(nouns) + len(others)


def test_a_prompt_without_topic_is_refused():
    assert topic_of("Describe the sky:") == "sky"
    with pytest.raises(ValueError, match=r"prompt: got 'Hello', expected one that names a topic \(sea, "):
        topic_of("Hello")


def test_win_probability_is_bradley_terry():
    # 1 / (1 + exp(-2)), 1 / (1 + exp(-4)), by hand.
    assert win_probability(3.0, 1.0) == pytest.approx(0.880797, abs=1e-6)
    assert win_probability(3.0, 1.0, temperature=0.5) == pytest.approx(0.982014, abs=1e-6)
    assert win_probability(1.0, 1.0) == 0.5
    assert win_probability(1e6, -1e6) == 1.0
    with pytest.raises(ValueError, match="temperature: got 0, expected a number > 0"):
        win_probability(1.0, 0.0, temperature=0)


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_one_of_the_two_wins(a, b):
    assert win_probability(a, b) + win_probability(b, a) == pytest.approx(1.0)


def test_the_same_seed_draws_the_same_world():
    def draws(seed):
        drawn = LanguageWorld(seed=seed)
        return [(drawn.pair(), drawn.labelled(), drawn.spoken()) for _ in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)


def test_the_judge_follows_the_reward_as_often_as_bradley_terry_says():
    drawn = LanguageWorld(seed=1)
    pairs = [drawn.pair() for _ in range(3000)]
    expected, found = [], []
    for pair in pairs:
        chosen, rejected = (true_reward(pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        expected.append(win_probability(max(chosen, rejected), min(chosen, rejected)))
        found.append(1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0)
    # Four standard errors of 3000 coin tosses.
    assert statistics.mean(found) == pytest.approx(statistics.mean(expected), abs=4 * 0.5 / math.sqrt(3000))
    assert judge_ceiling(pairs) == pytest.approx(statistics.mean(found))


def test_a_cold_judge_never_errs():
    drawn = LanguageWorld(seed=1, temperature=1e-3)
    for _ in range(200):
        pair = drawn.pair()
        assert true_reward(pair["prompt"], pair["chosen"]) >= true_reward(pair["prompt"], pair["rejected"])


def test_labels_follow_the_bar_and_are_balanced():
    drawn = LanguageWorld(seed=2)
    rows = [drawn.labelled() for _ in range(3000)]
    likely = [win_probability(true_reward(r["prompt"], r["completion"]), drawn.bar) for r in rows]
    share = statistics.mean(row["label"] for row in rows)
    assert share == pytest.approx(statistics.mean(likely), abs=4 * 0.5 / math.sqrt(3000))
    # KTO's paper asks for upvotes and downvotes of about the same weight.
    assert 0.45 < share < 0.6


def test_completions_are_of_mixed_quality():
    drawn = LanguageWorld(seed=0)
    rewards = [true_reward(row["prompt"], row["completion"]) for row in (drawn.spoken() for _ in range(2000))]
    assert abs(statistics.mean(rewards)) < 0.5
    assert statistics.stdev(rewards) > 1.5
    assert max(rewards) >= 4
    assert min(rewards) <= -4


def test_the_ceiling_of_no_pairs_is_refused():
    with pytest.raises(ValueError, match="pairs: got none, expected at least one pair"):
        judge_ceiling([])
