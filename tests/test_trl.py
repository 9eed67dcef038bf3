"""TRL's trainers: the same losses, metrics and weights as without Fusewright, policy alone optimised."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import real_text

import fusewright

pytest.importorskip("trl")
VOCAB = 256 + len(real_text.SPECIAL)
STEPS = 3
CLOCK = ("runtime", "per_second", "step_time", "total_flos", "num_input_tokens_seen", "mfu", "time")


def _model(**overrides: Any) -> Any:
    return models.build("llama", vocab_size=VOCAB, **overrides)


def _settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
        **more,
    }


def _data(kind: str, count: int = 16) -> Any:
    from datasets import Dataset

    said = real_text.paragraphs(count)
    asked, answers = said[1:] + said[:1], said
    rows: dict[str, Callable[[int], dict[str, Any]]] = {
        "text": lambda i: {"text": said[i]},
        "completion": lambda i: {"prompt": asked[i][:20], "completion": answers[i]},
        "messages": lambda i: {
            "messages": [
                {"role": "user", "content": asked[i][:20]},
                {"role": "assistant", "content": answers[i]},
            ]
        },
        "pairs": lambda i: {
            "prompt": asked[i][:20],
            "chosen": answers[i],
            "rejected": answers[i][::-1][:30],
        },
        "labelled": lambda i: {
            "prompt": asked[i][:20],
            "completion": answers[i],
            "label": i % 2 == 0,
        },
        "prompts": lambda i: {"prompt": asked[i][:12]},
    }
    return Dataset.from_list([rows[kind](i) for i in range(count)])


def _series(trainer: Any) -> dict[str, list[float]]:
    """Every logged number that does not depend on the clock."""
    out: dict[str, list[float]] = {}
    for line in trainer.state.log_history:
        for name, value in line.items():
            if not any(word in name for word in CLOCK):
                out.setdefault(name, []).append(float(value))
    return out


def _assert_same(ours: Any, eager: Any, *named: str, tolerance: float = 1e-5) -> None:
    """Every logged number, ``named`` ones among them, and the trained weights."""
    got, wanted = _series(ours), _series(eager)
    assert got.keys() == wanted.keys() and {"loss", "grad_norm", *named} <= wanted.keys()
    for name, series in wanted.items():
        if name == "rewards/accuracies":
            # While the policy is its reference the margin is zero, and its sign is rounding's.
            series, got[name] = series[1:], got[name][1:]
        # A margin of two log-probabilities is a difference of sums of order 100.
        np.testing.assert_allclose(got[name], series, rtol=tolerance, atol=1e-5, err_msg=name)
    assert all(math.isfinite(v) for v in wanted["loss"]) and any(wanted["grad_norm"])
    for (name, a), b in zip(
        ours.model.state_dict().items(), eager.model.state_dict().values(), strict=True
    ):
        assert float((a - b).norm()) <= tolerance * float(b.norm()), name


def _assert_rewritten(model: Any, **more: int) -> None:
    """The blocks are; the head is TRL's own, which never makes the logits either."""
    wanted = models.expected_counts("llama") | more
    del wanted["linear_cross_entropy"]
    report = fusewright.report(model)
    assert {n: c for n, c in report.counts.items() if n in wanted} == wanted, report.counts
    assert not report.eager_now


def _trained(make: Callable[[Any], Any], when: str = "before", build: Any = _model) -> Any:
    """(ours, eager's) trainers; ``make`` builds one from a model."""
    trainers = []
    for optimised in (True, False):
        model = build()
        if optimised and when == "before":
            fusewright.optimize(model, lowering="fx")
        trainer = make(model)
        if optimised and when == "after":
            fusewright.optimize(trainer.model, lowering="fx")
        trainer.train()
        trainers.append(trainer)
    return tuple(trainers)


SFT: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {}),
    "completion": ("completion", {"completion_only_loss": True}),
    "assistant": ("messages", {"assistant_only_loss": True}),
    "padding_free": ("text", {"padding_free": True, "max_length": None}),
    "packing": ("text", {"packing": True, "max_length": 96}),
    "dft": ("completion", {"loss_type": "dft"}),
}


# Padding-free is what packing does, with more in a row; completions are masked as an assistant's turns.
_SLOW = ("dft", "padding_free", "completion")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] if c in _SLOW else []) for c in SFT]
)
def test_sft(tmp_path: Path, case: str) -> None:
    from trl import SFTConfig, SFTTrainer

    kind, more = SFT[case]
    given = {"max_length": 80} | more

    def make(model: Any) -> Any:
        return SFTTrainer(
            model,
            SFTConfig(**_settings(tmp_path, eval_strategy="no", **given)),
            train_dataset=_data(kind),
            processing_class=real_text.tokenizer(),
        )

    ours, eager = _trained(make, "after" if case == "text" else "before")
    _assert_same(ours, eager, "entropy", "mean_token_accuracy", "num_tokens")
    _assert_rewritten(ours.model)


def test_sft_with_adapters_and_evaluation(tmp_path: Path) -> None:
    """The trainer makes the adapters, over a model that is optimised already."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    def make(model: Any) -> Any:
        return SFTTrainer(
            model,
            SFTConfig(**_settings(tmp_path, eval_strategy="steps", eval_steps=1, max_length=80)),
            train_dataset=_data("completion"),
            eval_dataset=_data("completion", 4),
            processing_class=real_text.tokenizer(),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )

    ours, eager = _trained(make)
    _assert_same(ours, eager, "eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    _assert_rewritten(ours.model, lora=7 * models.LAYERS)


@pytest.mark.parametrize(
    "adapters", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "lora"]
)
def test_dpo(tmp_path: Path, adapters: bool) -> None:
    """With a reference model of its own, or the policy without its adapters."""
    from trl import DPOConfig, DPOTrainer

    references = []

    def make(model: Any) -> Any:
        reference = None if adapters else _model()
        references.append(reference)
        return DPOTrainer(
            model,
            reference,
            DPOConfig(**_settings(tmp_path, max_length=80)),
            train_dataset=_data("pairs"),
            processing_class=real_text.tokenizer(),
        )

    build = (lambda: models.with_lora(_model())) if adapters else _model
    ours, eager = _trained(make, build=build)
    _assert_same(ours, eager, "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy")
    _assert_rewritten(ours.model, **({"lora": 7 * models.LAYERS} if adapters else {}))
    if not adapters:
        assert [type(m) for m in references[0].modules()] == [type(m) for m in _model().modules()]


def test_a_trainer_that_reads_the_logits(tmp_path: Path) -> None:
    """CPO takes log-probabilities, a loss and a metric from them; they are never made."""
    pytest.importorskip("trl.experimental.cpo")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainers = []
    for optimised in (True, False):
        model = _model()
        if optimised:
            fusewright.optimize(model, lowering="fx", logits="chunked")
        trainer = CPOTrainer(
            model=model,
            args=CPOConfig(**_settings(tmp_path, max_length=80)),
            train_dataset=_data("pairs"),
            processing_class=real_text.tokenizer(),
        )
        trainer.train()
        trainers.append(trainer)
    _assert_same(*trainers, "nll_loss", "logps/chosen", "logits/chosen", "rewards/margins")
    _assert_rewritten(trainers[0].model)
    assert not fusewright.report(trainers[0].model).notes  # none was computed as a whole


def test_kto(tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    def make(model: Any) -> Any:
        return KTOTrainer(
            model,
            _model(),
            args=KTOConfig(**_settings(tmp_path, max_length=80)),
            train_dataset=_data("labelled"),
            processing_class=real_text.tokenizer(),
        )

    ours, eager = _trained(make)
    _assert_same(ours, eager)
    _assert_rewritten(ours.model)


def test_reward(tmp_path: Path) -> None:
    """A classification head over the blocks: what makes the score is not a language model's loss."""
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    def build() -> Any:
        import torch

        config = models.config("llama", vocab_size=VOCAB, num_labels=1)
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        models.perturb(model.parameters())
        return model

    def make(model: Any) -> Any:
        return RewardTrainer(
            model,
            RewardConfig(**_settings(tmp_path, max_length=80)),
            train_dataset=_data("pairs"),
            processing_class=real_text.tokenizer(),
        )

    ours, eager = _trained(make, build=build)
    _assert_same(ours, eager, "accuracy", "margin", "mean_reward")
    _assert_rewritten(ours.model)


def test_grpo(tmp_path: Path) -> None:
    """Completions are sampled from the optimised policy; the reference is it without adapters."""
    from trl import GRPOConfig, GRPOTrainer

    def vowels(completions: list[str], **_: Any) -> list[float]:
        return [sum(c in "aeiou" for c in text) / 4 for text in completions]

    def make(model: Any) -> Any:
        return GRPOTrainer(
            model,
            vowels,
            args=GRPOConfig(
                **_settings(tmp_path), num_generations=2, max_completion_length=12, beta=0.1
            ),
            train_dataset=_data("prompts"),
            processing_class=real_text.tokenizer(),
        )

    ours, eager = _trained(make, build=lambda: models.with_lora(_model()))
    _assert_same(ours, eager, "reward", "kl", "entropy", "completions/mean_length")
    _assert_rewritten(ours.model, lora=7 * models.LAYERS)
