"""Any feedback in a loop of your own, with accelerate: one process or several, DDP, FSDP or DeepSpeed.

The data are pairs, labels or rankings. The reference is the model before training, or a table of `prefloss reference`.
A second start continues after the last saved epoch. Arguments: model, data, output; then a loss and a table if needed.

    accelerate launch --config_file examples/configs/ddp.yaml examples/accelerate_loop.py my-model pairs.jsonl out
"""

import copy
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from accelerate import Accelerator, DataLoaderConfiguration
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from prefloss.data import read
from prefloss.training import PreferenceCollator, PreferenceObjective, Reference


def main(model, data, output, loss="dpo", table=None, *, epochs=2, batch_size=4, accumulate=4, rate=1e-6):
    """Train, and return the metrics of the last epoch."""
    set_seed(0)
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    reference = Reference.table(table) if table else Reference.model(copy.deepcopy(policy))
    objective = PreferenceObjective(loss, reference=reference, autocast=accelerator.autocast)
    loader = DataLoader(read(data).rows, batch_size, shuffle=True, collate_fn=PreferenceCollator(tokenizer))
    policy, optimizer, loader = accelerator.prepare(policy, AdamW(policy.parameters(), lr=rate), loader)
    accelerator.register_for_checkpointing(objective)
    saved, metrics = len(list(Path(output).glob("epoch-*/saved"))), {}
    if saved:
        accelerator.load_state(f"{output}/epoch-{saved - 1}")
    for epoch in range(saved, epochs):
        loader.set_epoch(epoch)
        batches = iter(loader)
        while step := list(islice(batches, accumulate)):
            objective.count(step)
            for left, batch in zip(reversed(range(len(step))), step, strict=True):
                accelerator.gradient_state._set_sync_gradients(not left)
                with accelerator.no_sync(policy) if left else nullcontext():
                    accelerator.backward(objective(policy.train(), batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            objective.step()
        metrics = objective.metrics()
        accelerator.save_state(f"{output}/epoch-{epoch}")
        accelerator.wait_for_everyone()
        Path(output, f"epoch-{epoch}", "saved").touch()
    weights, first = accelerator.get_state_dict(policy), accelerator.is_main_process
    accelerator.unwrap_model(policy).save_pretrained(output, state_dict=weights, is_main_process=first)
    return metrics


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
