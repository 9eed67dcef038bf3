"""Train one tiny model type optimised and eager, side by side, in every mode; say what came of it.

The modes are float32 and bfloat16, plain and with LoRA, each without and with gradient
checkpointing (which reuses the compiled regions). In float32 the first step's loss and gradients
are held against eager's, and the losses of the two steps after. In bfloat16 the mean error of loss
and gradients against float64 is held against eager's own.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import models
import torch
import training
import zoo_census
import zoo_configs
from zoo_exact import NotTrainable, against_float64, bfloat16, brief

import fusewright
from fusewright.compiler import driver

STEPS, RATE = 3, 0.01
TOLERANCE = 1e-5
MODES = ("fp32", "fp32+lora", "bf16", "bf16+lora")

# Which of the census's families a pattern's rewrites belong to, by the pattern's name.
FAMILY = {
    "rms_norm": "norm", "layer_norm": "norm", "add_rms_norm": "norm", "gated_rms_norm": "norm",
    "l2_norm": "norm", "group_norm": "norm",
    "rope": "rope", "glu": "glu", "moe_glu": "glu",
    "cross_entropy": "loss", "linear_cross_entropy": "loss", "log_probabilities": "loss",
    "qk_norm_rope": "norm",
}  # fmt: skip


def run(name: str, modes: Iterable[str] = MODES) -> dict[str, Any]:
    """Everything about one type; "status" is "ran" or "eager does not train"."""
    started = time.perf_counter()
    out: dict[str, Any] = {"type": name, "class": zoo_configs.names()[name], "modes": {}}
    try:
        model, batch = _trainable(name)
    except NotTrainable as reason:
        return out | {"status": "eager does not train", "reason": str(reason)}
    census = zoo_census.take(model, lambda: model(**batch))
    out["sites"] = {f: census.total(f) for f in zoo_census.FAMILIES}
    out["status"] = "ran"
    for mode in modes:
        began = time.perf_counter()
        out["modes"][mode] = _mode(name, mode, batch, census)
        out["modes"][mode]["seconds"] = round(time.perf_counter() - began, 2)
    out["seconds"] = round(time.perf_counter() - started, 2)
    return out


def _trainable(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model and a batch on which eager takes a step with finite loss and gradients."""
    try:
        model = zoo_configs.build(name)
    except zoo_configs.FAILURES as error:
        raise NotTrainable(f"not built: {brief(error)}") from error
    failures = []
    for batch in _batches(model):
        try:
            step = training.train_step(model, batch)
        except zoo_configs.FAILURES as error:
            failures.append(brief(error))
            continue
        if math.isfinite(float(step.loss)) and step.grads:
            return model, batch
        failures.append("the loss is not finite or nothing gets a gradient")
    raise NotTrainable(failures[0])


def _batches(model: Any, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    full = models.batch(seed)
    return [full, {k: v for k, v in full.items() if k != "attention_mask"}]


def of_mode(name: str, mode: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The type's eager model in a mode, which has not run yet, and a batch on which it trains."""
    model, batch = _trainable(name)
    return _built(name, mode, zoo_census.take(model, lambda: model(**batch))), batch


def _built(name: str, mode: str, census: zoo_census.Census) -> Any:
    """Built anew: a forward pass may leave state behind that cannot be copied."""
    full = mode.startswith("fp32")
    dtype = torch.float32 if full else torch.bfloat16
    model = zoo_configs.build(name, dtype, every_expert=not full)
    if mode.endswith("+lora"):
        return _with_lora(model, census.linears, 0.05 if full else 0.0)
    return model


def _mode(
    name: str,
    mode: str,
    batch: dict[str, torch.Tensor],
    census: zoo_census.Census,
) -> dict[str, Any]:
    full = mode.startswith("fp32")
    try:
        eager = _built(name, mode, census)
        # Both are new at their first step: it may build modules, and that draws random numbers.
        ours = copy.deepcopy(eager)
        training.train_step(copy.deepcopy(eager), batch)
    except (NotTrainable, *zoo_configs.FAILURES) as error:
        # PEFT refuses some types, bf16 others: eager's own failure.
        return {"status": "eager does not train", "reason": brief(error)}
    try:
        fusewright.optimize(ours, lowering="fx")
    except zoo_configs.FAILURES as error:  # the sweep goes on; the table names it as broken
        return {"status": "broken", "reason": f"optimize: {brief(error)}"}
    row: dict[str, Any] = {}
    for checkpointing in (False, True):
        key = "gc" if checkpointing else "plain"
        if checkpointing and not _checkpointing(eager, ours):
            row["gc"] = {"status": "eager does not train", "reason": "has no checkpointing"}
            continue
        try:
            if checkpointing:
                training.train_step(eager, batch)
        except zoo_configs.FAILURES as error:
            row[key] = {"status": "eager does not train", "reason": brief(error)}
            continue
        try:
            if full:
                measured = _float32(eager, ours, batch)
            else:
                measured = bfloat16(eager, ours, batch, row.get("plain", {}))
        except NotTrainable as error:
            measured = {"status": "eager does not train", "reason": str(error)}
        except zoo_configs.FAILURES as error:
            measured = {"status": "broken", "reason": brief(error)}
        row[key] = measured
        if not checkpointing:
            row |= _coverage(ours, census)
    row["status"] = "broken" if _broken(row) else "ran"
    return row


def _broken(row: dict[str, Any]) -> bool:
    return any(row[k].get("status") in ("broken", "differs") for k in ("plain", "gc"))


def _checkpointing(eager: Any, ours: Any) -> bool:
    try:
        for model in (eager, ours):
            model.gradient_checkpointing_enable()
            if hasattr(model, "peft_config"):
                model.enable_input_require_grads()
        return True
    except (ValueError, AttributeError, NotImplementedError):
        return False


def _with_lora(model: Any, linears: list[str], dropout: float) -> Any:
    """Adapters on every linear that ran, but the head's and routers'."""
    from peft import LoraConfig, get_peft_model

    last = model.get_output_embeddings()
    kept = [
        path
        for path, module in model.named_modules()
        if path in linears
        and module is not last
        and path.rpartition(".")[2] not in ("gate", "router", "out_proj", "lm_head")
    ]
    if not kept:
        raise NotTrainable("no linear to adapt")
    if any("expert" in n for n, _ in model.named_parameters()):
        # PEFT takes these names for stacked expert parameters too, and refuses dropout on those.
        kept = [path for path in kept if not re.search(r"(gate|up|down)_proj$", path)]
    settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=kept, bias="none")
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    models.perturb(p for p in adapted.parameters() if p.requires_grad)
    return adapted.train()


def _float32(eager: Any, ours: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Relative differences of the first step, and of the losses after steps of plain descent."""
    start = [copy.deepcopy(m.state_dict()) for m in (eager, ours)]
    theirs, losses = _train(eager, batch)
    mine, own = _train(ours, batch)
    for model, state in zip((eager, ours), start, strict=True):
        model.load_state_dict(state)
    errors = training.relative_errors(mine, theirs)
    worst = max(errors, key=lambda n: errors[n])
    later = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(own, losses, strict=True))
    row = {"loss": errors["loss"], "largest": errors[worst], "where": worst, "later": later}
    same = errors[worst] <= TOLERANCE and later <= TOLERANCE
    row["status"] = "same" if same else "differs"
    if not same and errors["loss"] <= TOLERANCE:
        # The model itself may amplify float32's rounding; float64 tells who is further off.
        row |= against_float64(ours, eager, batch)
    return row


def _train(model: Any, batch: dict[str, torch.Tensor]) -> tuple[training.Step, list[float]]:
    first = training.train_step(model, batch)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=RATE)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad()
    return first, losses


def _coverage(ours: Any, census: zoo_census.Census) -> dict[str, Any]:
    """What was rewritten and missed, and how much of the census that is."""
    report = fusewright.report(ours)
    fired = _fired(ours)
    covered = {f: _covered(census.sites[f], fired[f]) for f in zoo_census.FAMILIES}
    missed = [
        {"pattern": r.pattern, "count": r.count, "where": r.where, "source": _tail(r.source),
         "reason": r.reason}
        for r in report.rows if r.status == "missed"
    ]  # fmt: skip
    seconds = [r["seconds"] for r in report.regions]
    return {
        "fired": report.counts,
        "covered": covered,
        "uncovered": _uncovered(census, fired),
        "missed": missed,
        "breaks": report.graph_breaks,
        "eager_now": report.eager_now,
        "notes": report.notes,
        "graphs": len(report.regions),
        "unverified": sorted({r["verification"]["reason"] for r in report.regions} - {""}),
        "match_seconds": max((s.get("match", 0.0) for s in seconds), default=0.0),
        "compile_seconds": round(sum(sum(s.values()) for s in seconds), 2),
    }


def _fired(ours: Any) -> dict[str, Counter[str]]:
    """family -> module's path in the model -> rewritten instances."""
    found: dict[str, Counter[str]] = {f: Counter() for f in zoo_census.FAMILIES}
    for record in driver._required(ours).records:
        for match in () if record.failure else record.matches:
            for region in record.modules:
                path = f"{region}.{match.module}".strip(".")
                family = FAMILY.get(match.pattern)
                if family is not None and not match.refines:  # an earlier match counts that site
                    found[family][_unwrapped(path)] += match.candidate.share
    return found


def _unwrapped(path: str) -> str:
    """The path in the model without adapters."""
    inside = f"{path}.".removeprefix("base_model.model.").removesuffix(".")
    return inside.replace(".base_layer", "")


def _related(site: str, fired: str) -> bool:
    return f"{site}.".startswith(f"{fired}.".lstrip(".")) or f"{fired}.".startswith(f"{site}.")


def _covered(sites: dict[str, int], fired: Counter[str]) -> int:
    return sum(sites.values()) - sum(_short(sites, fired).values())


def _short(sites: dict[str, int], fired: Counter[str]) -> dict[str, int]:
    """Sites without a rewrite of their own module, or of one around or inside it."""
    left = Counter(fired)
    short: dict[str, int] = {}
    for path, count in sorted(sites.items(), key=lambda item: -len(item[0])):
        for found in sorted((f for f in left if _related(path, f)), key=lambda f: f != path):
            taken = min(count, left[found])
            left[found] -= taken
            count -= taken
        if count:
            short[path] = count
    return short


def _uncovered(census: zoo_census.Census, fired: dict[str, Counter[str]]) -> dict[str, Any]:
    found = {f: _short(census.sites[f], fired[f]) for f in zoo_census.FAMILIES}
    return {f: short for f, short in found.items() if short}


def _tail(source: str) -> str:
    return source.rpartition("/")[2]
