"""KTO on upvotes and downvotes that are out of balance, shuffled, two at a time, in transformers' own Trainer.

One answer in eight is liked. Upvotes weigh more in return, and the KL baseline is a running mean, so neither batch size
nor order matters; it is saved with checkpoints. A tiny model stands in for yours; nothing is downloaded.

    python examples/kto_upvotes.py
"""

import copy
import random

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from prefloss.integrations.transformers import PreferenceCollator, PreferenceLossCallback, Reference

KIND, RUDE = ["please", "thanks", "gladly", "welcome"], ["no", "never", "whatever", "go"]
WORDS = ["<pad>", "<eos>", "<unk>", "could", "you", "help", "me", *KIND, *RUDE]


def votes(count, seed):
    """Kind answers are liked, rude ones not."""
    rng = random.Random(seed)
    made = []
    for liked in rng.choices([True, False], weights=[1, 7], k=count):
        answer = " " + " ".join(rng.choices(KIND if liked else RUDE, k=3))
        made.append({"prompt": "could you help me", "completion": answer, "label": liked})
    return made


def main(steps=60):
    """Train, and return the metrics on votes that were held out."""
    hf.set_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(WORDS), **sizes))
    hyperparameters = {"desirable_weight": 7.0, "kl_baseline": "running_mean"}
    loss = PreferenceLossCallback("kto", reference=Reference.model(copy.deepcopy(model)), **hyperparameters)
    batches = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "remove_unused_columns": False,
    }
    trainer = hf.Trainer(
        model,
        hf.TrainingArguments(max_steps=steps, learning_rate=2e-3, report_to="none", **batches),
        train_dataset=votes(512, seed=0),
        eval_dataset=votes(64, seed=1),
        data_collator=PreferenceCollator(tokenizer),
        callbacks=[loss],
    )
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    print("mean reward of liked answers above the others':", main()["eval_rewards/margins"])
