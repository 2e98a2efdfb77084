"""Other packages' progress bars and messages, kept off a screen that has its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# What prefloss says itself, with counts.
_SAID = ("The tokenized prompt is not a prefix", "You have different amounts of desirable")


class _Collector(logging.Handler):
    """Keeps each message once, in order."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not any(said in text for said in _SAID):
            self.messages[f"{record.name.partition('.')[0]}: {text}"] = None


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Silence datasets, transformers and TRL; the list fills with what they warned of when the block ends."""
    import datasets
    from transformers.utils import logging as hf_logging

    heard: list[str] = []
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "accelerate", "peft")]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    bars = not datasets.are_progress_bars_disabled(), hf_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    hf_logging.disable_progress_bar()
    for logger in loggers:
        logger.handlers, logger.propagate = [collector], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield heard
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        if bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            hf_logging.enable_progress_bar()
    # Of Python warnings, ours are for the user; those of other packages are for their developers.
    ours = (str(w.message) for w in caught if "prefloss" in w.filename)
    heard += [*collector.messages, *dict.fromkeys(ours)]
