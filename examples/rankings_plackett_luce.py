"""Rankings of any length with the Plackett-Luce loss, in `transformers.Trainer`.

Each prompt has two to five answers with scores. The model here is tiny and the data are token ids. For text, use
`PreferenceCollator(tokenizer)` and the columns `prompt`, `completions` and `scores`. Nothing is downloaded.

    python examples/rankings_plackett_luce.py
"""

import copy
import random

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from prefloss.integrations.transformers import PreferenceLossCallback
from prefloss.training import PreferenceCollator, Reference

WORDS, END = range(2, 64), 1


def rankings(count, seed):
    """Answers of different lengths; more even tokens give a higher score."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        answers = [rng.choices(WORDS, k=rng.randint(3, 8)) for _ in range(rng.randint(2, 5))]
        scores = [sum(token % 2 == 0 for token in answer) / len(answer) for answer in answers]
        ids = [[*answer, END] for answer in answers]
        rows.append({"prompt_ids": rng.choices(WORDS, k=4), "completions_ids": ids, "scores": scores})
    return rows


def main(steps=60):
    """Train, and return the metrics on held-out rankings."""
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    loss = PreferenceLossCallback("dpo_pl", beta=0.1, reference=Reference.model(copy.deepcopy(model)))
    trainer = Trainer(
        model,
        TrainingArguments(max_steps=steps, learning_rate=5e-3, remove_unused_columns=False, report_to="none"),
        train_dataset=rankings(256, seed=0),
        eval_dataset=rankings(64, seed=1),
        data_collator=PreferenceCollator(),
        callbacks=[loss],
    )
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    print("best above worst in held-out rankings:", main()["eval_rewards/accuracies"])
