"""Code written to fool the compiler: how much of it there is, and that none of it is rewritten wrongly.

Two sources. Whole blocks of which one part is a look-alike (``near_blocks``), and the look-alikes in
the tests of each family, run here once more at another number of rows than the one they were captured
with. Whatever the compiler makes of one, outputs, gradients and values changed in place are eager's;
what is not rewritten has a reason in the report, or nothing that any family would look at.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import test_patterns_attention
import test_patterns_cross_entropy
import test_patterns_glu_near
import test_patterns_layer_norm
import test_patterns_log_probabilities
import test_patterns_lora
import test_patterns_rms_norm_near
import test_patterns_rope_near
import torch
from graphs import Compiled, _assert_equal, check, compile_one, rows
from near_blocks import ITSELF, LEFT, NEAR_BLOCKS, OPS, WIDTH, Block
from torch import nn

FAMILIES = (
    test_patterns_attention,
    test_patterns_cross_entropy,
    test_patterns_glu_near,
    test_patterns_layer_norm,
    test_patterns_log_probabilities,
    test_patterns_lora,
    test_patterns_rms_norm_near,
    test_patterns_rope_near,
)
LEAST = 60
# Look-alikes that are left alone without a row in the report: no family has anything to look at.
MOST_WITHOUT_A_ROW = 26
# Their code, or a weight of theirs, has the number of rows.
FIXED = ("class_axis_transposed", "product_with_a_head_of_each_row")


def _block_inputs(batch: int = 2) -> list[Any]:
    angle = torch.randn(batch, 5, WIDTH // 4)
    angle = torch.cat((angle, angle), -1)
    return [rows(batch, 5, WIDTH), angle.cos(), angle.sin()]


def _count(compiled: Compiled, part: str) -> int:
    """How many instances of a part's family the rewritten block has, fused with others or not."""
    matches = [m for record in compiled.session.records for m in record.matches]
    return sum(m.candidate.share for m in matches if OPS[part] in m.pattern)


def test_the_intact_block_is_rewritten() -> None:
    block = Block()
    compiled = compile_one(block)
    _assert_equal(compiled.run, block, _block_inputs())
    assert all(_count(compiled, part) for part in OPS)


@pytest.mark.parametrize(
    ("part", "look_alike", "outcome"), NEAR_BLOCKS, ids=[f.__name__ for _, f, _ in NEAR_BLOCKS]
)
def test_a_block_with_a_look_alike(part: str, look_alike: Any, outcome: str) -> None:
    block = Block(**{part: look_alike})
    compiled = compile_one(block)
    for batch in (2, 3):
        _assert_equal(compiled.run, block, _block_inputs(batch))
    expected = {LEFT: False, ITSELF: True}[outcome]
    assert bool(_count(compiled, part)) is expected, (compiled.ops, compiled.misses)
    others = [p for p in OPS if p != part]
    assert all(_count(compiled, p) for p in others), "the rest of the block is no longer rewritten"


def _family_cases() -> list[tuple[Any, Any, str]]:
    """(module, look-alike, outcome) of every look-alike in the families' own tests."""
    cases = []
    for module in FAMILIES:
        cases += [(module, row[0], LEFT) for row in module.LEFT_ALONE]
        cases += [(module, row[0], ITSELF) for row in module.MATCHED_AS_WHAT_IT_IS]
    return cases


CASES = _family_cases()


def _inputs(module: Any, name: str) -> list[Any]:
    return module._inputs_for(name) if hasattr(module, "_inputs_for") else module._inputs()


def _another_batch(inputs: list[Any]) -> list[Any]:
    """The same parameters, the other tensors with one more of what they have along the batch."""
    return [_longer(i) if isinstance(i, torch.Tensor) else i for i in inputs]


def _longer(t: torch.Tensor) -> torch.Tensor:
    if isinstance(t, nn.Parameter):
        return t
    longer = torch.cat((t.detach(), t.detach()[:1].flip(-1)))
    return longer.requires_grad_(t.requires_grad)


def _id(case: tuple[Any, Any, str]) -> str:
    return f"{case[0].__name__.removeprefix('test_patterns_')}-{case[1].__name__}"


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_a_look_alike_at_another_number_of_rows(case: tuple[Any, Any, str]) -> None:
    module, look_alike, outcome = case
    head = module is test_patterns_cross_entropy
    compiled = compile_one(look_alike, "head" if head else "block")
    inputs = _inputs(module, look_alike.__name__)
    more = [] if look_alike.__name__ in FIXED else [_another_batch(inputs)]
    for given in (inputs, *more):
        _assert_equal(compiled.run, look_alike, given)
    assert bool(compiled.ops) is (outcome == ITSELF), (compiled.ops, compiled.misses)


def test_there_are_many_and_each_has_its_reason() -> None:
    outcomes = Counter(o for _, _, o in [*NEAR_BLOCKS, *CASES])
    silent = [row[0].__name__ for module in FAMILIES for row in module.LEFT_ALONE if row[2] is None]
    total = len({f.__name__ for _, f, _ in NEAR_BLOCKS}) + len(CASES)
    print(f"\n{total} look-alikes: {dict(outcomes)}, {len(silent)} without a row: {silent}")
    assert total >= LEAST and len(NEAR_BLOCKS) >= LEAST // 2
    assert len(silent) <= MOST_WITHOUT_A_ROW, silent


def test_the_suite_can_fail() -> None:
    """A look-alike taken for the real thing is seen: eager's results are compared, not the ops."""

    def computes(x, w):
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def claims(x, w):
        return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6))

    inputs = [rows(2, 5, WIDTH), nn.Parameter(torch.ones(WIDTH))]
    check(computes, inputs, {"rms_norm": 1})
    with pytest.raises(AssertionError, match="is off by"):
        _assert_equal(compile_one(computes).run, claims, inputs)
