"""The five-second check before a commit: one tiny model, optimised, one step, held against eager."""

from __future__ import annotations

import models
import training

import fusewright


def test_one_step() -> None:
    eager = models.build("llama")
    ours = fusewright.optimize(models.twin(eager), lowering="fx")
    batch = models.batch()
    training.assert_same_step(training.train_step(ours, batch), training.train_step(eager, batch))
    assert fusewright.report(ours).counts == models.expected_counts("llama")
