"""Norms and rope on a GPU: bytes moved over copy bandwidth, errors, peers and memory.

    python bench/bench_kernels_norms.py OUT.json [--budget SECONDS] [--quick | --dry]

What is compiled is compiled first, in many processes. Liger-Kernel is measured where it can be
imported. A table of one line a kernel is printed last. ``--dry`` makes every step at tiny shapes,
and needs no GPU: then the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import norm_peers
import torch
from fused_cases import GatedCase, QkCase
from kernels_report import wanted
from norm_cases import NormCase, RopeCase
from place import ON_GPU, name
from roofline import (
    copy_bandwidth,
    fresh_bandwidth,
    fresh_milliseconds,
    table,
)
from row_case import RowCase, outputs_of

from fusewright.runtime.op import register_all

WIDTHS = (1024, 2048, 2304, 4096, 5120, 6144, 8192, 11008, 16384)
FEW = (1024, 4096, 16384)  # with 4k and 64k rows
NORMS = [(k, d) for k in ("rms", "add") for d in ("forward", "dx", "dx+dw")]
NORMS += [("layer", d) for d in ("forward", "dx+dw")]
HEADS = ((32, 8, 128), (32, 8, 64), (64, 8, 128), (16, 16, 256), (32, 32, 96))
QK_HEADS = ((32, 8, 128), (64, 8, 128))  # Qwen3 8B and 32B
# (order, width, group, rows a token): the heads of Qwen3-Next, as rows and as groups; Mamba-2 2.7B;
# Mamba-2 of 8192 in eight groups
GATED = (("after", 128, 128, 32), ("after", 4096, 128, 1), ("before", 5120, 5120, 1),
         ("before", 8192, 1024, 1))  # fmt: skip
DIRECTIONS = ("forward", "dx", "dx+dw")
SUMMARY = ["name", "asked", "least", "at", "median", "enough", "ours", "eager", "compile", "liger",
           "MiB", "eager MiB", "error"]  # fmt: skip


def cases(quick: bool, tiny: bool) -> Iterator[RowCase]:
    """Every case, the most telling shapes first."""
    if tiny:
        yield from _shapes(64, (256, 300), ((4, 2, 64),), ((4, 2, 64),), (("after", 256, 64, 1),
                           ("before", 256, 256, 1)))  # fmt: skip
        return
    yield from _shapes(
        16384, FEW if quick else WIDTHS, HEADS[:2] if quick else HEADS, QK_HEADS, GATED
    )
    for rows in () if quick else (4096, 65536):
        yield from _shapes(rows, FEW, HEADS[:1], QK_HEADS, GATED)


def _shapes(rows: int, widths: Any, heads: Any, qk_heads: Any, gated: Any) -> Iterator[RowCase]:
    yield from (NormCase(*n, rows, w) for w in widths for n in NORMS)
    for direction in ("forward", "dx"):
        yield from (RopeCase(direction, rows, *h) for h in heads)
        yield RopeCase(direction, rows, *heads[0], layout="interleaved")
    yield RopeCase("forward", rows, *heads[0], packed=True)
    for direction in DIRECTIONS:
        yield from (QkCase(direction, rows, *h) for h in qk_heads)
        yield from (GatedCase(o, direction, rows * n, w, g) for o, w, g, n in gated)
    yield QkCase("forward", rows, *qk_heads[0], packed=True)


def _compile(jobs: list[tuple[bool, RowCase]]) -> None:
    for peer, case in jobs:
        if peer:
            norm_peers.warm(case)
        else:
            case.ours()()
    torch.cuda.synchronize()


def warm(quick: bool, tiny: bool) -> None:
    """Compile the kernels, and torch.compile's, in many processes at once, into their caches."""
    few = {replace(c, rows=512) for c in cases(quick, tiny) if c.rows == 16384}  # type: ignore[type-var]
    jobs = [(True, c) for c in norm_peers.compared(tiny)]
    jobs += [(False, c) for c in sorted(few, key=str)]
    count = max(1, min(16, (os.cpu_count() or 2) - 1))
    # each process compiles by itself: pools of Inductor's in every one would be too many
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=spawn) as pool:
        list(pool.map(_compile, [jobs[i::count] for i in range(count)]))


def _error(a: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((a.detach().double() - oracle.detach()).square().mean().sqrt())


def _results(case: RowCase, function: Callable[..., Any], leaves: list[torch.Tensor]) -> list[Any]:
    out = outputs_of(function(*leaves))
    torch.manual_seed(1)
    up = [torch.randn(o.shape, device=o.device).to(torch.bfloat16).to(o.dtype) for o in out]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    return [*out, *torch.autograd.grad(out, asked, up)]


def _checked(tiny: bool) -> Iterator[RowCase]:
    rows, widths = (64, (256,)) if tiny else (2048, (1024, 5120, 16384))
    heads = (4, 2, 64) if tiny else (32, 8, 128)
    for dtype in (torch.bfloat16, torch.float32):
        for width in widths:
            yield from (NormCase(k, "dx+dw", rows, width, dtype) for k in ("rms", "add", "layer"))
        yield GatedCase("after", "dx+dw", rows, widths[0], heads[2], dtype)
        yield GatedCase("before", "dx+dw", rows, widths[0], widths[0], dtype)
        yield QkCase("dx+dw", rows, *heads, dtype=dtype)
        yield RopeCase("dx", rows, *heads, dtype=dtype, packed=True)
        yield RopeCase("dx", rows, *heads, dtype=dtype, layout="interleaved")


def errors(tiny: bool) -> list[dict[str, Any]]:
    """Each result's error against float64, ours and eager's."""
    rows = []
    for case in _checked(tiny):
        leaves = case.leaves()
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
        outputs = len(outputs_of(case.op(*leaves)))
        oracle = _results(case, case.eager, wide)
        ours, eager = _results(case, case.op, leaves), _results(case, case.eager, leaves)
        for at, (o, e, true) in enumerate(zip(ours, eager, oracle, strict=True)):
            mine, theirs = _error(o, true), _error(e, true)
            slack = 1.002 if case.dtype is torch.bfloat16 else 1.6
            row = {"name": case.name, "dtype": str(case.dtype), "rows": case.rows}
            row |= {"width": case.width, "result": at, "ours": mine, "eager": theirs}
            row["direction"] = "forward" if at < outputs else case.direction
            rows.append(row | {"ok": mine <= slack * theirs})
    return rows


def shares(chosen: list[RowCase], copy: float, deadline: float) -> list[dict[str, Any]]:
    """Bytes over copy bandwidth, of a large copy and of one that moves the same bytes."""
    rows, own = [], {}
    for at, case in enumerate(chosen):
        if time.monotonic() > deadline:
            print(f"out of time: {len(chosen) - at} of {len(chosen)} shapes were not measured")
            break
        ms = fresh_milliseconds(case.ours, case.bytes)
        size = max(2**22, case.bytes // 2**22 * 2**22)
        own[size] = own.get(size) or fresh_bandwidth(size)
        rate = case.bytes / ms
        row = {"name": case.name, "rows": case.rows, "width": case.width, "us": ms * 1e3}
        rows.append(row | {"of_copy": rate / copy, "of_own_copy": rate / own[size]})
    return rows


def peers(tiny: bool, deadline: float) -> list[dict[str, Any]]:
    """Our autograd op beside eager, torch.compile and Liger: microseconds and MiB."""
    rows = []
    for case in norm_peers.compared(tiny):
        if time.monotonic() > deadline:
            print("out of time: the remaining peers were not measured")
            break
        rows.append(norm_peers.measure(case))
    return rows


def _called(error: dict[str, Any]) -> str:
    """The kernel whose result an error is: the case's name with the result's own direction."""
    called = error["name"]
    if error["direction"] == "forward":
        for direction in ("dx+dw", "dx", "backward"):
            called = called.replace(f" {direction}", " forward")
    return str(called)


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One line a kernel: what was asked and reached, its peers' microseconds, the worst error."""
    peers_ = {r["name"]: r for r in found["peers"]}
    lines = []
    for kernel in dict.fromkeys(r["name"] for r in found["roofline"]):
        own = sorted((r for r in found["roofline"] if r["name"] == kernel),
                     key=lambda r: r["of_copy"])  # fmt: skip
        asked, peer = wanted(kernel), peers_.get(kernel, {})
        line = {"name": kernel, "asked": asked, "least": round(own[0]["of_copy"], 2)}
        line |= {"at": f"{own[0]['rows']}x{own[0]['width']}"}
        line |= {"median": round(own[len(own) // 2]["of_copy"], 2)}
        line |= {"enough": f"{sum(r['of_copy'] >= asked for r in own)}/{len(own)}"}
        line |= {n: peer.get(n) for n in norm_peers.NAMES}
        line |= {"MiB": peer.get("ours MiB"), "eager MiB": peer.get("eager MiB")}
        errors_ = [
            e["ours"] / e["eager"]
            for e in found["errors"]
            if "bfloat16" in e["dtype"] and e["eager"] and _called(e) == kernel
        ]
        lines.append(line | {"error": max(errors_, default=None)})
    return lines


def main() -> None:
    """Measure, write JSON, print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--budget", type=float, default=140.0)
    parser.add_argument("--quick", action="store_true", help="16k rows of few widths alone")
    parser.add_argument("--dry", action="store_true", help="tiny shapes; needs no GPU")
    options = parser.parse_args()
    if not (ON_GPU or options.dry):
        parser.error("there is no GPU; --dry needs none")
    begin, tiny = time.monotonic(), options.dry
    if ON_GPU:
        warm(options.quick, tiny)
        print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    register_all()
    copy = copy_bandwidth()
    found: dict[str, Any] = {"device": name(), "torch": torch.__version__}
    found["copy_TB_per_s"] = copy / 1e9
    chosen = list(cases(options.quick, tiny))
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("errors", lambda: errors(tiny)),
        ("peers", lambda: peers(tiny, begin + 0.6 * options.budget)),
        ("roofline", lambda: shares(chosen, copy, begin + options.budget)),
    ]
    for step, run in steps:
        found[step] = run()
        with open(options.out, "w") as file:
            json.dump(found, file, indent=1)
        print(f"{step} at {time.monotonic() - begin:.0f} s", flush=True)
    worse = [e for e in found["errors"] if not e["ok"]]
    print(f"errors above eager's: {len(worse)} of {len(found['errors'])} results")
    print(table(worse[:8], ["name", "dtype", "rows", "width", "result", "ours", "eager"]))
    print(
        "share of the copy bandwidth; microseconds, MiB and bf16 error over eager's at 16384x4096"
    )
    print(table(summary(found), SUMMARY))
    print(f"copy {copy / 1e9:.3f} TB/s; {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
