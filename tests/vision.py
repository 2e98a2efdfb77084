"""A tiny LLaVA with its processor, and pairs about random images."""

import random

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE = "<image>"
WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<eos>", "<unk>", IMAGE]
SIDE = 8


def processor():
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def model(seed=0):
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **sizes,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=4, projection_dim=32, **sizes),
        text_config=text,
        image_token_index=SPECIAL.index(IMAGE),
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config)


def pairs(rows=8, seed=0):
    rng, colors = random.Random(seed), np.random.default_rng(seed)

    def text(shortest, longest):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(shortest, longest)))

    return Dataset.from_list(
        [
            {
                "images": [Image.fromarray(colors.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))],
                "prompt": f"{IMAGE} {text(2, 4)}",
                "chosen": f" {text(1, 5)}",
                "rejected": f" {text(1, 5)}",
            }
            for _ in range(rows)
        ]
    )
