"""Tiny models that read images, with their processors, and pairs and labels about random images."""

import random

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

IMAGE, BEGIN, END = "<image>", "<boi>", "<eoi>"
WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<eos>", "<unk>", IMAGE, BEGIN, END]
SIDE = 8
# Where an image stands in a prompt.
PLACES = {"llava": IMAGE, "qwen2_vl": IMAGE, "gemma3": BEGIN}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    **SIZES,
    "vocab_size": len(SPECIAL) + len(WORDS),
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


class _WithoutVideos(Qwen2VLProcessor):
    """Qwen2-VL's processor without the part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        return None


def tokenizer():
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE, "boi_token": BEGIN, "eoi_token": END},
    )


def processor(family="llava"):
    """The processor of a family; each image becomes 4 tokens."""
    side = {"height": SIDE, "width": SIDE}
    if family == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessorPil(size=side), tokenizer(), image_seq_length=4)
    if family == "qwen2_vl":
        images = Qwen2VLImageProcessorPil(
            patch_size=2, merge_size=2, min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE
        )
        return _WithoutVideos(images, tokenizer())
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side),
        tokenizer=tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def model(seed=0, family="llava"):
    torch.manual_seed(seed)
    place = SPECIAL.index(IMAGE)
    if family == "gemma3":
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={**TEXT, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 16},
                vision_config={**SIZES, "image_size": SIDE, "patch_size": 2},
                mm_tokens_per_image=4,
                image_token_id=place,
                boi_token_index=SPECIAL.index(BEGIN),
                eoi_token_index=SPECIAL.index(END),
            )
        )
    if family == "qwen2_vl":
        rotary = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
        return Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rotary},
                vision_config={**vision, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2},
                image_token_id=place,
            )
        )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=4, projection_dim=32, **SIZES),
            text_config=LlamaConfig(**TEXT),
            image_token_index=place,
            image_seq_length=4,
        )
    )


def pairs(rows=8, seed=0, family="llava"):
    """Pairs: an image in a prompt of words, and two completions."""
    return Dataset.from_list(
        [
            {**asked, "chosen": f" {text(1, 5)}", "rejected": f" {text(1, 5)}"}
            for asked, text in _prompts(rows, seed, family)
        ]
    )


def labels(rows=8, seed=0, family="llava"):
    """Completions of such prompts, every other one desirable."""
    return Dataset.from_list(
        [
            {**asked, "completion": f" {text(1, 5)}", "label": i % 2 == 0}
            for i, (asked, text) in enumerate(_prompts(rows, seed, family))
        ]
    )


def _prompts(rows, seed, family):
    """Image and prompt of each row, and a function (shortest, longest) -> random words."""
    rng, colors = random.Random(seed), np.random.default_rng(seed)

    def text(shortest, longest):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(shortest, longest)))

    for _ in range(rows):
        image = Image.fromarray(colors.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
        yield {"images": [image], "prompt": f"{PLACES[family]} {text(2, 4)}"}, text
