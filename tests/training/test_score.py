"""Scores of completions, without gradient, in evaluation mode."""

import pytest
import torch

from prefloss.training import score_rows
from tests import tiny

ROWS = [([3, 4], [5, 6, 1]), ([7], [8]), ([9, 10, 11], []), ([3], [12, 0, 14, 15, 1])]


def dropping_model():
    """A model that drops out in training mode."""
    model = tiny.model()
    model.model.norm.register_forward_hook(
        lambda module, args, output: torch.dropout(output, 0.5, module.training)
    )
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("training", [True, False])
def test_scores_by_definition(batch_size, training):
    model, done = dropping_model(), []
    model.train(training)
    found = score_rows(model, ROWS, batch_size=batch_size, padding=2, on_batch=done.append)
    assert model.training is training
    assert sum(done) == len(ROWS)
    assert max(done) == min(batch_size, len(ROWS))
    model.eval()
    for (prompt, completion), score in zip(ROWS, found, strict=True):
        ids = torch.tensor([prompt + completion])
        logps = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        assert score.tokens == len(completion)
        assert score.logp == pytest.approx(
            logps[len(prompt) - 1 :].sum().item() if completion else 0.0, abs=1e-4
        )


def test_an_error_leaves_the_mode_as_it_was():
    def fail(*_):
        raise RuntimeError("out of memory")

    model = tiny.model().train()
    model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        score_rows(model, ROWS, batch_size=1)
    assert model.training
