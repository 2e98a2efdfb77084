"""KTO on labels in `transformers.Trainer`: shuffled, two per batch, with far fewer upvotes than downvotes.

One label in eight is an upvote, so upvotes get a larger weight. The KL baseline is a running mean, so neither batch
size nor order matters; checkpoints keep it. The model here is tiny; use your own. Nothing is downloaded.
Run: python examples/kto_upvotes.py
"""

import copy
import random

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from prefloss.integrations.transformers import PreferenceLossCallback
from prefloss.training import PreferenceCollator, Reference

KIND, RUDE = ["please", "thanks", "gladly", "welcome"], ["no", "never", "whatever", "go"]
WORDS = ["<pad>", "<eos>", "<unk>", "could", "you", "help", "me", *KIND, *RUDE]


def labels(count, seed):
    """Upvotes for kind answers, downvotes for rude ones."""
    rng = random.Random(seed)
    rows = []
    for upvote in rng.choices([True, False], weights=[1, 7], k=count):
        answer = " " + " ".join(rng.choices(KIND if upvote else RUDE, k=3))
        rows.append({"prompt": "could you help me", "completion": answer, "label": upvote})
    return rows


def main(steps=60):
    """Train, and return the metrics on held-out labels."""
    hf.set_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(WORDS), **sizes))
    kto = "kto(desirable_weight=7, kl_baseline=running_mean)"
    loss = PreferenceLossCallback(kto, reference=Reference.model(copy.deepcopy(model)))
    batches = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "remove_unused_columns": False,
    }
    trainer = hf.Trainer(
        model,
        hf.TrainingArguments(max_steps=steps, learning_rate=2e-3, report_to="none", **batches),
        train_dataset=labels(512, seed=0),
        eval_dataset=labels(64, seed=1),
        data_collator=PreferenceCollator(tokenizer),
        callbacks=[loss],
    )
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    print("mean reward of upvoted minus downvoted answers:", main()["eval_rewards/margins"])
