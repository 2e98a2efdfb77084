"""A preference world of generated text, small enough to read in two pages, whose true reward is known.

Real preference data do not say what the judge really liked. Here the judge is a function, so a training run can be
measured against the true reward. The world has the four parts of learning from human feedback:

1. *Prompts* name a topic: "Tell me about the sea:".
2. *Completions* are short sentences from a small grammar, of mixed quality: some stay on the topic,
   some wander off, some are polite, some are rude, some repeat themselves. Written down as they come,
   they are the text that a model first learns to speak from (supervised training).
3. The *true reward* scores a completion for its prompt: words on the topic and polite words count for
   it, rude and repeated words against it. The learner never sees this number.
4. The *judge* sees two completions of one prompt and says which is better, noisily, as Bradley and
   Terry described in 1952: the better one wins with probability 1 / (1 + exp(-difference / temperature)).
   Or the judge gives one completion an upvote or a downvote by the same rule, against a fixed bar.

A preference loss sees only what the judge said. If the trained model's own sentences then earn more
true reward than before, the loss has learned what the judge likes.

    >>> world = LanguageWorld(seed=0)
    >>> true_reward("Tell me about the sea:", " Gladly, the wave meets the shore. Thanks!")
    4.0
    >>> true_reward("Tell me about the sea:", " Ugh, the oven meets the oven.")
    -3.0
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

TOPICS: dict[str, tuple[str, ...]] = {
    "sea": ("wave", "salt", "ship", "tide", "whale", "shore"),
    "forest": ("oak", "moss", "fern", "deer", "pine", "trail"),
    "city": ("street", "tower", "tram", "bridge", "square", "market"),
    "kitchen": ("oven", "spoon", "bread", "soup", "knife", "kettle"),
    "sky": ("cloud", "star", "moon", "wind", "comet", "dawn"),
    "garden": ("rose", "seed", "bee", "soil", "pond", "fence"),
}
POLITE = ("gladly", "please", "thanks", "friend")
RUDE = ("ugh", "boring", "whatever", "fool")
ADJECTIVES = ("old", "quiet", "bright", "small", "near")
VERBS = ("meets", "follows", "likes")
QUESTIONS = ("Tell me about the {}:", "Describe the {}:", "What is in the {}?")

# What a completion earns. The caps keep "longer" from meaning "better".
ON_TOPIC, MOST_ON_TOPIC = 1.0, 3
POLITENESS, MOST_POLITE = 1.0, 2
RUDENESS = -2.0
REPETITION = -1.0
BEST_REWARD = ON_TOPIC * MOST_ON_TOPIC + POLITENESS * MOST_POLITE
WORST_REWARD = -BEST_REWARD

_NOUNS = tuple(noun for nouns in TOPICS.values() for noun in nouns)


def words(text: str) -> list[str]:
    """The lower-case words of a text, in order, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def topic_of(prompt: str) -> str:
    """The topic that a prompt asks about.

    Raises:
        ValueError: The prompt names none of `TOPICS`.
    """
    topic = next((word for word in words(prompt) if word in TOPICS), None)
    if topic is None:
        raise ValueError(f"prompt: got {prompt!r}, expected one that names a topic ({', '.join(TOPICS)})")
    return topic


def true_reward(prompt: str, completion: str) -> float:
    """True reward of a completion; the learner never sees it.

    +1 for each different on-topic word (at most 3), +1 for each different polite word (at most 2),
    -2 for each rude word, -1 each time a noun comes again. Clipped to [WORST_REWARD, BEST_REWARD].
    """
    said = words(completion)
    nouns = [word for word in said if word in _NOUNS]
    on_topic = len(set(nouns) & set(TOPICS[topic_of(prompt)]))
    polite = len(set(said) & set(POLITE))
    reward = ON_TOPIC * min(on_topic, MOST_ON_TOPIC) + POLITENESS * min(polite, MOST_POLITE)
    reward += RUDENESS * sum(word in RUDE for word in said) + REPETITION * (len(nouns) - len(set(nouns)))
    return max(WORST_REWARD, min(BEST_REWARD, reward))


def win_probability(reward_a: float, reward_b: float, temperature: float = 1.0) -> float:
    """Bradley-Terry: the probability that the judge prefers a over b.

    Args:
        reward_a: True reward of a.
        reward_b: True reward of b.
        temperature: How noisy the judge is, > 0, in units of reward; near 0, the better one always wins.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number > 0")
    # tanh does not overflow, exp does
    return 0.5 * (1 + math.tanh((reward_a - reward_b) / (2 * temperature)))


@dataclass
class LanguageWorld:
    """Draws prompts, completions and the judge's answers; the same seed draws the same world.

    Args:
        seed: Of every draw.
        temperature: Noise of the judge, > 0, in units of reward.
        bar: True reward at which an upvote and a downvote are equally likely.
    """

    seed: int = 0
    temperature: float = 1.0
    bar: float = 0.0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def prompt(self) -> str:
        """One question about one topic, as "Tell me about the sea:"."""
        return self._random.choice(QUESTIONS).format(self._random.choice(tuple(TOPICS)))

    def completion(self, prompt: str) -> str:
        """One answer of mixed quality, with a leading space, as " Gladly, the wave meets the shore."."""
        draw = self._random
        # Share of on-topic nouns; drawn per sentence, so that good and bad ones both occur.
        care = draw.choice((0.1, 0.5, 0.9))
        topic = topic_of(prompt)
        sentence = " and ".join(self._clause(topic, care) for _ in range(draw.choice((1, 1, 2))))
        opener = draw.choice(("", "", "", "gladly, ", "please, ", "ugh, ", "boring, "))
        closer = draw.choice(("", "", "", " Thanks!", " Thanks, friend!", " Whatever!", " Whatever, fool!"))
        sentence = opener + sentence
        return f" {sentence[0].upper()}{sentence[1:]}.{closer}"

    def pair(self) -> dict[str, str]:
        """One judged pair: prompt, chosen, rejected; the two are never the same text."""
        prompt = self.prompt()
        a, b = self.completion(prompt), self.completion(prompt)
        while a == b:
            b = self.completion(prompt)
        p = win_probability(true_reward(prompt, a), true_reward(prompt, b), self.temperature)
        chosen, rejected = (a, b) if self._random.random() < p else (b, a)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def labelled(self) -> dict[str, str | bool]:
        """One completion with an upvote (True) or a downvote (False): prompt, completion, label."""
        prompt = self.prompt()
        completion = self.completion(prompt)
        p = win_probability(true_reward(prompt, completion), self.bar, self.temperature)
        return {"prompt": prompt, "completion": completion, "label": self._random.random() < p}

    def spoken(self) -> dict[str, str]:
        """One line of the text a model first learns to speak from: prompt, completion; not judged."""
        prompt = self.prompt()
        return {"prompt": prompt, "completion": self.completion(prompt)}

    def _clause(self, topic: str, care: float) -> str:
        draw = self._random
        subject = self._noun(topic, care)
        # Now and then a noun comes twice.
        other = subject if draw.random() < 0.15 else self._noun(topic, care)
        article = draw.choice(("the", "one"))
        shape = draw.randrange(3)
        if shape == 0:
            return f"{article} {subject} is {draw.choice(ADJECTIVES)}"
        if shape == 1:
            return f"{article} {subject} {draw.choice(VERBS)} the {other}"
        return f"{article} {draw.choice(ADJECTIVES)} {subject} {draw.choice(VERBS)} the {other}"

    def _noun(self, topic: str, care: float) -> str:
        on_topic = self._random.random() < care
        return self._random.choice(TOPICS[topic] if on_topic else _NOUNS)


def judge_ceiling(pairs: list[dict[str, str]]) -> float:
    """Share of judged pairs whose chosen side truly earns more (ties count half).

    The judge is noisy, so not even the true reward agrees with all of its answers: a learner that
    scores above this on held-out pairs has been lucky.
    """
    if not pairs:
        raise ValueError("pairs: got none, expected at least one pair")
    wins = 0.0
    for pair in pairs:
        chosen, rejected = (true_reward(pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        wins += 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
    return wins / len(pairs)
