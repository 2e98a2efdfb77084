"""Token ids: the same as TRL's trainers make, padded on the right."""

import copy

import pytest
import torch
from datasets import Dataset, disable_progress_bars

from prefloss.data.tokens import encode, pad
from prefloss.demo.model import tiny_llama, train_tokenizer

TEXTS = ["What is this?", "A bird, I think.", "No idea", "user assistant"] * 3
ROW = {"prompt": "What is this?", "chosen": "A bird, I think.", "rejected": "No idea"}
CHAT = {
    "prompt": [{"role": "user", "content": ROW["prompt"]}],
    "chosen": [{"role": "assistant", "content": ROW["chosen"]}],
    "rejected": [{"role": "assistant", "content": ROW["rejected"]}],
}


@pytest.mark.parametrize("row", [ROW, CHAT], ids=["plain", "chat"])
@pytest.mark.filterwarnings("ignore")
def test_completions_are_split_where_trl_splits_them(row, tmp_path):
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    model = tiny_llama(tokenizer, hidden=8, layers=1, heads=1)
    trainer = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(
            str(tmp_path),
            bf16=False,
            use_cpu=True,
            report_to="none",
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]
    assert encode(tokenizer, row["prompt"], row["chosen"]) == (theirs["prompt_ids"], theirs["chosen_ids"])
    assert encode(tokenizer, row["prompt"], row["rejected"])[1] == theirs["rejected_ids"]


def test_rows_are_padded_on_the_right_and_cut():
    batch = pad([([5, 6], [7, 8, 9]), ([5], [7])], padding=0, max_length=4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_one_form_per_row():
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    with pytest.raises(TypeError, match="got plain text beside messages, expected both in one form"):
        encode(tokenizer, ROW["prompt"], CHAT["chosen"])
