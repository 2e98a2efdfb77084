"""Trainings that end early go on as if they had not: killed, or resumed on another number of processes."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from prefloss.integrations.transformers import PreferenceCollator
from tests import tiny
from tests import two_processes as two

pytestmark = pytest.mark.slow
STEPS, SAVED = 4, 2


def trained(folder, *, size=4, resume=None, callbacks=()):
    """BCO, whose shift is a running mean; on two processes each has half of the batch."""
    policy = tiny.model()
    trainer = tiny.plain_build(
        folder,
        tiny.plain_callback(policy, "bco"),
        policy,
        data=tiny.labels(24),
        collator=PreferenceCollator(tiny.tokenizer()),
        callbacks=callbacks,
        max_steps=STEPS,
        per_device_train_batch_size=size,
        save_strategy="steps",
        save_steps=SAVED,
        optim="sgd",
        learning_rate=0.3,
        ddp_find_unused_parameters=False,
    )
    trainer.train(resume_from_checkpoint=resume)
    return tiny.weights(trainer.model), tiny.callback_of(trainer).loss_state


def same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=2e-6)
    for name, value in wanted[1].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5)


class KillsItself(TrainerCallback):
    """As the kernel does when memory runs out: nothing is flushed or cleaned up."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SAVED + 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_training_goes_on_exactly(tmp_path):
    code = f"""
import warnings
warnings.simplefilter("ignore")
from pathlib import Path
from tests.integrations.transformers import test_resume
test_resume.trained(Path({str(tmp_path)!r}), callbacks=[test_resume.KillsItself()])
"""
    root = Path(__file__).parents[3]
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert ended.returncode == -signal.SIGKILL
    resumed = trained(tmp_path, resume=str(tmp_path / f"checkpoint-{SAVED}"))
    same(resumed, trained(tmp_path / "whole"))


def worker(rank, folder):
    # The process group is there already; accelerate reads that it is from these.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", **address)
    warnings.simplefilter("ignore")
    folder = Path(folder)
    return trained(folder / "two", size=2), trained(
        folder / "one", size=2, resume=str(folder / "one" / f"checkpoint-{SAVED}")
    )


@pytest.mark.filterwarnings("ignore")
def test_another_number_of_processes_goes_on_where_the_first_stopped(tmp_path):
    alone = trained(tmp_path / "one")
    for together, resumed_by_two in two.run(tmp_path, worker, str(tmp_path)):
        same(together, alone)
        same(resumed_by_two, alone)
    same(trained(tmp_path / "two", resume=str(tmp_path / "two" / f"checkpoint-{SAVED}")), alone)
