"""Images and other model inputs in batches of `PreferenceCollator`."""

import pytest
import torch

from prefloss.data.errors import DataError
from prefloss.training import PreferenceBatch, PreferenceCollator, batch_logps
from tests import vision

INPUTS = ["pixel_values"]


def examples(rows=3):
    """Token ids and pixels of pairs, as a processor makes them."""
    processor = vision.processor()
    made = []
    for row in vision.pairs(rows):
        prompt = processor(images=row["images"], text=row["prompt"], return_tensors="pt")
        made.append(
            {
                "prompt_ids": prompt["input_ids"][0].tolist(),
                "pixel_values": prompt["pixel_values"],
                **{
                    f"{side}_ids": processor.tokenizer(row[side])["input_ids"] + [1]
                    for side in ("chosen", "rejected")
                },
            }
        )
    return made


def test_each_row_is_scored_with_the_image_of_its_prompt():
    rows, model = examples(), vision.model()
    batch = PreferenceCollator(model_inputs=INPUTS)(rows)
    assert batch["pixel_values"].shape == (6, 3, vision.SIDE, vision.SIDE)
    found = batch_logps(model, PreferenceBatch.of(batch).rows).logps.sum(-1)
    for i, row in enumerate(rows):
        for place, side in ((i, "chosen_ids"), (i + len(rows), "rejected_ids")):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            logits = model(input_ids=ids, pixel_values=row["pixel_values"]).logits[0, :-1]
            logps = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            wanted = logps[len(row["prompt_ids"]) - 1 :].sum()
            torch.testing.assert_close(found[place], wanted, rtol=1e-5, atol=1e-5)


def test_types_of_tokens_are_extended_over_completions():
    row = {
        "prompt_ids": [3, 3, 5],
        "chosen_ids": [6, 1],
        "rejected_ids": [7, 8, 1],
        "mm_token_type_ids": [1, 1, 0],
    }
    short = {**row, "prompt_ids": [3], "mm_token_type_ids": torch.tensor([1])}
    batch = PreferenceCollator(model_inputs=["mm_token_type_ids"])([row, short])
    assert batch["mm_token_type_ids"].tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]


def test_mismatched_rows_have_the_image_of_their_prompt():
    pixels = [torch.full((2, 3), 1.0), torch.full((1, 3), 2.0)]
    rows = [
        {"prompt_ids": [5], "completion_ids": [6, 1], "label": True, "pixel_values": pixels[0]},
        {"prompt_ids": [7], "completion_ids": [8, 1], "label": False, "pixel_values": pixels[1]},
    ]
    batch = PreferenceCollator(mismatched=True, model_inputs=INPUTS)(rows)
    for name in ("pixel_values", "kl_pixel_values"):
        assert torch.equal(batch[name], torch.cat(pixels))
    assert batch["kl_input_ids"].tolist() == [[5, 8, 1], [7, 6, 1]]
    assert set(PreferenceBatch.of(batch).mismatched.inputs) == {"input_ids", "attention_mask", "pixel_values"}


ROW = {"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [8, 1], "pixel_values": torch.ones(1, 3)}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([ROW], {}, r"column 'pixel_values': got .*PreferenceCollator\(model_inputs="),
        (
            [{**ROW, "images": ["a.png"]}],
            {"model_inputs": INPUTS},
            r"column 'images': got \['a.png'\], which the coll",
        ),
        (
            [ROW, {**ROW, "pixel_values": None}],
            {"model_inputs": INPUTS},
            "example 1 of the batch: column 'pixel_values': expected it in every example or in none",
        ),
        (
            [ROW, {**ROW, "pixel_values": torch.ones(1, 4)}],
            {"model_inputs": INPUTS},
            r"got tensors of shapes \[\[1, 3\], \[1, 4\]\], expected the same shape but for",
        ),
        (
            [{**ROW, "pixel_values": 1.0}],
            {"model_inputs": INPUTS},
            "expected a tensor with a first dimension",
        ),
        ([{**ROW, "pixel_values": ["a"]}], {"model_inputs": INPUTS}, "expected numbers or a tensor"),
        (
            [{**ROW, "token_type_ids": [0]}],
            {"model_inputs": [*INPUTS, "token_type_ids"]},
            r"got shape \[1\], expected one for each of the prompt's 2 tokens",
        ),
        (
            [{**ROW, "prompt_ids": [5] * 4}],
            {"model_inputs": INPUTS, "max_length": 3},
            "got a prompt of 4 tokens and max_length=3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, options, message):
    with pytest.raises(DataError, match=message):
        PreferenceCollator(**options)(given)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_only_padded_rows_take_model_inputs(layout):
    with pytest.raises(ValueError, match=f"layout: got '{layout}' beside model_inputs="):
        PreferenceCollator(layout=layout, model_inputs=INPUTS)


def test_names_are_a_list():
    with pytest.raises(TypeError, match="model_inputs: got 'pixel_values', expected a list of columns"):
        PreferenceCollator(model_inputs="pixel_values")
