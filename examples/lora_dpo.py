"""DPO of a LoRA adapter in `transformers.Trainer`: the reference is the same model with the adapter switched off.

So there is only one model in memory. The model here is tiny and the data are token ids; use your own model and text.
Nothing is downloaded.

    python examples/lora_dpo.py
"""

import random

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from prefloss.integrations.transformers import PreferenceLossCallback
from prefloss.training import PreferenceCollator, Reference

WORDS, END = range(2, 64), 1


def pairs(count, seed):
    """The chosen answer has even tokens, the rejected one odd ones."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        even, odd = ([*rng.choices(WORDS[start::2], k=rng.randint(3, 6)), END] for start in (0, 1))
        rows.append({"prompt_ids": rng.choices(WORDS, k=4), "chosen_ids": even, "rejected_ids": odd})
    return rows


def main(steps=60):
    """Train, and return the metrics on held-out pairs."""
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    # To continue an adapter that was trained before, load a frozen copy of it and pass Reference.adapter("its name").
    loss = PreferenceLossCallback("dpo", beta=0.1, reference=Reference.adapter_off())
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
