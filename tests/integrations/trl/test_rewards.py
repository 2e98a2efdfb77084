"""`prefloss.Scorer` beside TRL: the rewards that its trainers log, and a reward function for GRPO."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import prefloss
from tests import tiny


@pytest.mark.parametrize(("kind", "loss"), [("dpo", "dpo(beta=0.3)"), ("kto", "kto(beta=0.3)")])
def test_rewards_are_those_that_trl_logs(tmp_path, kind, loss):
    # Adapters that are not zero, so that policy and reference differ; a learning rate of 0 leaves them.
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    data = tiny.pairs(6) if kind == "dpo" else tiny.labels(6)
    run = tiny.train(
        kind,
        tmp_path,
        data=data,
        peft_config=adapter,
        beta=0.3,
        max_steps=1,
        per_device_train_batch_size=6,
        learning_rate=0.0,
    )
    scorer = prefloss.Scorer(run.trainer.model, tiny.tokenizer(), "adapter", loss=loss)
    if kind == "dpo":
        prompts = list(data["prompt"])
        chosen, rejected = (scorer(prompts, list(data[side])) for side in ("chosen", "rejected"))
    else:
        chosen, rejected = (
            scorer([row["prompt"] for row in rows], [row["completion"] for row in rows])
            for rows in ([row for row in data if row["label"] is liked] for liked in (True, False))
        )
    assert abs(float(chosen.reward.mean())) > 1e-3
    for side, scores in (("chosen", chosen), ("rejected", rejected)):
        assert run.logs[0][f"rewards/{side}"] == pytest.approx(float(scores.reward.mean()), abs=1e-5)
        assert run.logs[0][f"logps/{side}"] == pytest.approx(float(scores.logp.mean()), abs=1e-4)


@pytest.mark.parametrize("form", ["plain", "messages"])
def test_a_step_of_grpo(tmp_path, form):
    words = tiny.tokenizer()
    ending = "{{ '' if add_generation_prompt else '<eos>' }}"
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}" + ending
    prompts = ["w1 w2", "w3 w4 w5"]
    if form == "messages":
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    scorer = prefloss.Scorer(tiny.model(1), words, tiny.model(2))
    reward, seen = scorer.reward_func(), []

    def watch(prompts, completions, **columns):
        seen.append((prompts, completions))
        return [0.0] * len(prompts)

    trainer = GRPOTrainer(
        model=tiny.model(0),
        reward_funcs=[reward, watch],
        args=GRPOConfig(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=5,
            logging_steps=1,
            activation_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            seed=3,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts * 2}),
        processing_class=words,
    )
    trainer.train()
    ((sampled_prompts, completions),) = seen
    assert len(completions) == 4
    found = reward(prompts=sampled_prompts, completions=completions)
    logged = trainer.state.log_history[0]
    assert logged["rewards/implicit_reward/mean"] == pytest.approx(sum(found) / 4, abs=1e-5)
    assert logged["reward_std"] > 0
