"""Norms and rope on a GPU: bytes moved over copy bandwidth, errors, peers, and host cost.

    python bench/bench_kernels_norms.py OUT.json [--budget SECONDS] [--quick]

Needs a CUDA device; Liger-Kernel is measured where it can be imported. The table is printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from norm_cases import EPS, NormCase, RopeCase
from roofline import (
    copy_bandwidth,
    fresh_bandwidth,
    fresh_milliseconds,
    host_microseconds,
    table,
)

from fusewright.runtime.op import register_all

Case = NormCase | RopeCase
ROWS = (4096, 16384, 65536)
WIDTHS = (1024, 2048, 2304, 4096, 5120, 6144, 8192, 11008, 16384)
NORMS = [("rms", d) for d in ("forward", "dx", "dx+dw")]
NORMS += [("add", d) for d in ("forward", "dx", "dx+dw")]
NORMS += [("layer", d) for d in ("forward", "dx+dw")]
HEADS = ((32, 8, 128), (32, 8, 64), (64, 8, 128), (16, 16, 256), (32, 32, 96))
PEER_SHAPES = ((16384, 2048), (16384, 4096), (16384, 8192))
PEERS = ["name", "rows", "width", "ours", "eager", "compile", "liger"]
ERRORS = ["name", "rows", "width", "result", "ours", "eager", "ok"]


def cases(quick: bool) -> Iterator[Case]:
    """Every case, the most telling shapes first."""
    for rows in (16384,) if quick else (16384, 4096, 65536):
        for width in (1024, 4096, 8192, 16384) if quick else WIDTHS:
            yield from (NormCase(*n, rows, width) for n in NORMS)
        for heads in HEADS[:2] if quick else HEADS:
            yield from (RopeCase(d, rows, *heads) for d in ("forward", "backward"))
        yield from (RopeCase(d, rows, 32, 8, 128, "interleaved") for d in ("forward", "backward"))


def _compile(shapes: list[tuple[Any, ...]]) -> None:
    for kind, direction, width in shapes:
        NormCase(kind, direction, 512, width).ours()()
    torch.cuda.synchronize()


def warm(quick: bool) -> None:
    """Compile the norms' kernels in many processes at once, into Triton's cache."""
    norms = [c for c in cases(quick) if isinstance(c, NormCase)]
    shapes = sorted({(c.kind, c.direction, c.width) for c in norms}, key=str)
    jobs = max(1, min(16, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(jobs) as pool:
        list(pool.map(_compile, [shapes[i::jobs] for i in range(jobs)]))


def _error(a: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((a.double() - oracle).square().mean().sqrt())


def _results(case: Case, function: Callable[..., Any], leaves: list[torch.Tensor]) -> list[Any]:
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    up = [torch.randn(o.shape, device="cuda").to(torch.bfloat16).to(o.dtype) for o in out]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [*out, *torch.autograd.grad(out, wanted, up)]


def errors() -> list[dict[str, Any]]:
    """Each result's error against float64, ours and eager's."""
    checked: list[Case] = [
        NormCase(kind, "dx+dw", 2048, width, dtype)
        for kind in ("rms", "add", "layer")
        for width in (1024, 5120, 16384)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    checked += [
        RopeCase("backward", 2048, 32, 8, 128, layout) for layout in ("half", "interleaved")
    ]
    rows = []
    for case in checked:
        leaves = case.leaves(case.tensors())
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
        oracle = _results(case, case.eager, wide)
        ours, eager = _results(case, case.op, leaves), _results(case, case.eager, leaves)
        for at, (o, e, true) in enumerate(zip(ours, eager, oracle, strict=True)):
            mine, theirs = _error(o, true), _error(e, true)
            slack = 1.002 if case.dtype is torch.bfloat16 else 1.6
            rows.append(
                {
                    "name": f"{case.name} {case.dtype}"[:40],
                    "rows": getattr(case, "rows", None) or case.tokens,
                    "width": case.width,
                    "result": at,
                    "ours": f"{mine:.3e}",
                    "eager": f"{theirs:.3e}",
                    "ok": mine <= slack * theirs,
                }
            )
    return rows


def shares(quick: bool, copy: float, deadline: float) -> list[dict[str, Any]]:
    """Bytes over copy bandwidth, of a large copy and of one that moves the same bytes."""
    rows, own = [], {}
    for case in cases(quick):
        if time.monotonic() > deadline:
            print("out of time: the remaining shapes were not measured")
            break
        ms = fresh_milliseconds(case.ours, case.bytes)
        size = case.bytes // 2**22 * 2**22
        own[size] = own.get(size) or fresh_bandwidth(size)
        rate = case.bytes / ms
        rows.append(
            {
                "name": case.name,
                "rows": getattr(case, "rows", None) or case.tokens,
                "width": case.width,
                "us": ms * 1e3,
                "of_copy": rate / copy,
                "of_own_copy": rate / own[size],
            }
        )
    return rows


def _liger(case: Case) -> Callable[..., Any] | None:
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        return None
    if isinstance(case, RopeCase):
        if case.layout != "half":
            return None
        return lambda q, k, cos, sin: LigerRopeFunction.apply(q, k, cos[:, 0], sin[:, 0])
    if case.kind == "rms":
        return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
    if case.kind == "layer":
        return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS)
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    except ImportError:
        return None
    return lambda x, e, w: LigerFusedAddRMSNormFunction.apply(x, e, w, EPS, 0.0, "llama", False)


def _peer(case: Case, function: Callable[..., Any] | None) -> float | str | None:
    if function is None:
        return None
    try:
        return fresh_milliseconds(lambda: case.peer(function), case.bytes, 5) * 1e3
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
    ) as failure:  # a peer that cannot run is a line of the table, not the end
        torch.cuda.synchronize()
        return type(failure).__name__


def peers(deadline: float) -> list[dict[str, Any]]:
    """Microseconds of our autograd op, eager, torch.compile and Liger."""
    compared: list[Case] = [NormCase(*n, *s) for s in PEER_SHAPES for n in NORMS if n[1] != "dx"]
    compared += [RopeCase(d, 16384, 32, 8, 128) for d in ("forward", "backward")]
    rows = []
    for case in compared:
        if time.monotonic() > deadline:
            print("out of time: the remaining peers were not measured")
            break
        torch._dynamo.reset()
        rows.append(
            {
                "name": case.name,
                "rows": getattr(case, "rows", None) or case.tokens,
                "width": case.width,
                "ours": _peer(case, case.op),
                "eager": _peer(case, case.eager),
                "compile": _peer(case, torch.compile(case.eager, dynamic=False)),
                "liger": _peer(case, _liger(case)),
            }
        )
    return rows


def host() -> dict[str, float]:
    """Microseconds of host time a call, on tensors so small that the GPU waits."""
    cost = {}
    for case in (*(NormCase(k, "dx+dw", 8, 64) for k in ("rms", "add", "layer")),
                 RopeCase("backward", 8, 2, 2, 64)):  # fmt: skip
        leaves = case.leaves(case.tensors())
        plain = [t.detach() for t in leaves]
        name = case.name.split()[0]
        cost[f"{name} forward with grad"] = host_microseconds(lambda c=case, a=leaves: c.op(*a))
        cost[f"{name} forward without"] = host_microseconds(lambda c=case, a=plain: c.op(*a))
        run = replace(case, direction="forward").ours()
        cost[f"{name} forward, host function"] = host_microseconds(run)
        cost[f"{name} backward, host function"] = host_microseconds(case.ours())
    return cost


def _pivot(rows: list[dict[str, Any]]) -> str:
    """One line per case and number of rows, one column per width."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for r in rows:
        line = lines.setdefault((r["name"], r["rows"]), {"name": r["name"], "rows": r["rows"]})
        line[str(r["width"])] = round(r["of_copy"], 2)
    widths = sorted({str(r["width"]) for r in rows}, key=int)
    ordered = [lines[k] for k in sorted(lines)]
    return table(ordered, ["name", "rows", *widths])


def main() -> None:
    """Measure, write JSON, print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--budget", type=float, default=140.0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    begin = time.monotonic()
    warm(options.quick)
    print(f"compiled in {time.monotonic() - begin:.0f} s")
    register_all()
    copy = copy_bandwidth()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_TB_per_s": copy / 1e9,
    }
    steps: list[tuple[str, Callable[[], Any]]] = [
        ("errors", errors),
        ("host_us", host),
        ("peers_us", lambda: peers(begin + 0.45 * options.budget)),
        ("roofline", lambda: shares(options.quick, copy, begin + options.budget)),
    ]
    for name, step in steps:
        found[name] = step()
        with open(options.out, "w") as file:
            json.dump(found, file, indent=1)
        print(f"{name} at {time.monotonic() - begin:.0f} s", flush=True)
    print(table([e for e in found["errors"] if not e["ok"]] or found["errors"][:8], ERRORS))
    print({k: round(v, 1) for k, v in found["host_us"].items()})
    print(table(found["peers_us"], PEERS))
    print("bytes moved over the bandwidth of a large copy, by width")
    print(_pivot(found["roofline"]))
    print(f"copy {copy / 1e9:.3f} TB/s; {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
