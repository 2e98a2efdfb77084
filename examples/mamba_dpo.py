"""DPO of a state-space model (Mamba) in `transformers.Trainer`.

It needs no special treatment: rows are padded on the right, so padding comes after every token that is scored. The
model here is tiny and the data are token ids; use your own model and text. Nothing is downloaded.

    python examples/mamba_dpo.py
"""

import copy
import random

from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainingArguments, set_seed

from prefloss.integrations.transformers import PreferenceLossCallback
from prefloss.training import PreferenceCollator, Reference

WORDS, END = range(2, 64), 1


def pairs(count, seed):
    """The chosen answer repeats the prompt, the rejected one does not."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, other = rng.choices(WORDS, k=4), rng.choices(WORDS, k=4)
        rows.append({"prompt_ids": prompt, "chosen_ids": [*prompt, END], "rejected_ids": [*other, END]})
    return rows


def main(steps=60):
    """Train, and return the metrics on held-out pairs."""
    set_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8))
    loss = PreferenceLossCallback("dpo", beta=0.1, reference=Reference.model(copy.deepcopy(model)))
    trainer = Trainer(
        model,
        TrainingArguments(max_steps=steps, learning_rate=5e-3, remove_unused_columns=False, report_to="none"),
        train_dataset=pairs(512, seed=0),
        eval_dataset=pairs(64, seed=1),
        data_collator=PreferenceCollator(),
        callbacks=[loss],
    )
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    print("chosen above rejected in held-out pairs:", main()["eval_rewards/accuracies"])
