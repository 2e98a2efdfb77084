"""Your own loss in TRL's DPOTrainer: you write the formula, TRL does the rest.

The model here is tiny; use your own. Nothing is downloaded: python examples/trl_own_loss.py
"""

import copy
import random

from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

import prefloss
from prefloss.demo.model import tiny_llama, word_tokenizer
from prefloss.integrations.trl import PreferenceLossCallback

KIND, RUDE = ["please", "thanks", "gladly", "welcome"], ["no", "never", "whatever", "go"]


@prefloss.register
def enough_margin(pairs: prefloss.Pairs, *, beta: float = 0.1, target: float = 1.0):
    """Half the squared distance between the scaled margin and a target; 0 above the target.

    Args:
        pairs: Reads the log-ratios h of both sides, [pairs], nats.
        beta: KL strength, > 0.
        target: Scaled margin above which the loss is 0, > 0.
    """
    return (target - beta * pairs.margin()).clamp(min=0).square() / 2


def requests(count, seed):
    """Kind answers are preferred to rude ones."""
    rng = random.Random(seed)
    kind, rude = ([" " + " ".join(rng.choices(side, k=3)) for _ in range(count)] for side in (KIND, RUDE))
    return Dataset.from_dict({"prompt": ["could you help me"] * count, "chosen": kind, "rejected": rude})


def main(steps=60):
    """Train, and return the metrics on held-out pairs."""
    set_seed(0)
    tokenizer = word_tokenizer([" ".join(["could you help me", *KIND, *RUDE, ""])])
    model = tiny_llama(tokenizer, hidden=32)
    trainer = DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(max_steps=steps, learning_rate=2e-3, report_to="none", bf16=False),
        train_dataset=requests(512, seed=0),
        eval_dataset=requests(64, seed=1),
        processing_class=tokenizer,
        callbacks=[PreferenceLossCallback("enough_margin", target=0.5)],
    )
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    print("chosen above rejected in held-out pairs:", main()["eval_rewards/accuracies"])
