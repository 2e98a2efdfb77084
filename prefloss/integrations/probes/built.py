"""What a trainer is built from: a tiny model, a tokenizer of seven words, common settings; and reading its code."""

from __future__ import annotations

import re
import tempfile
from typing import Any


def tiny_model() -> Any:
    """A Llama that no step reads; trainers look at its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def tokenizer() -> Any:
    """Words of the rows that trainers are built with; no step reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(("<pad>", "</s>", "q", "p", "yes", "no", "<unk>"))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def common() -> dict[str, Any]:
    """Settings of transformers' trainers: on a CPU, in a folder of its own."""
    folder = tempfile.mkdtemp(prefix="prefloss-probe-")
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "remove_unused_columns": False,
    }


def compared(source: str) -> list[str]:
    """The loss types with which a trainer's code compares its own."""
    single = re.findall(r"""loss_type == ["'](\w+)["']""", source)
    listed = re.findall(r"""loss_type in [\[(]([^\])]+)[\])]""", source)
    return list(
        dict.fromkeys(single + [name for names in listed for name in re.findall(r"""["'](\w+)["']""", names)])
    )
