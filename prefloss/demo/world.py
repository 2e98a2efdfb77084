"""Old place of `prefloss.worlds.language`, for one release."""

from prefloss._deprecated import moved

_NAMES = (
    "TOPICS POLITE RUDE ADJECTIVES VERBS QUESTIONS ON_TOPIC MOST_ON_TOPIC POLITENESS MOST_POLITE RUDENESS REPETITION "
    "BEST_REWARD WORST_REWARD words topic_of true_reward win_probability judge_ceiling"
)
__getattr__ = moved(
    __name__,
    {
        "World": "prefloss.worlds.language:LanguageWorld",
        **{name: f"prefloss.worlds.language:{name}" for name in _NAMES.split()},
    },
)
