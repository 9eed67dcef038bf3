"""What this machine has and what would work on it: versions, devices, compilers."""

from __future__ import annotations

import platform
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from fusewright.versions import OLDEST, installed, obstacle

_OLDEST_CAPABILITY = (7, 5)


def findings() -> dict[str, Any]:
    """The findings: "python", "packages", "devices", "compilers", and "works": what -> why or ""."""
    packages = {name: installed(name) for name in OLDEST}
    devices = _devices()
    compilers = _compilers()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": devices,
        "compilers": compilers,
        "works": _works(packages, devices, compilers),
    }


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": platform.processor() or platform.machine(), "kind": "cpu"}
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            found.append(
                {
                    "name": properties.name,
                    "kind": "rocm" if torch.version.hip else "cuda",
                    "capability": [properties.major, properties.minor],
                    "memory": properties.total_memory,
                }
            )
    return found


def _compilers() -> dict[str, str | None]:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    cxx = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    cc = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return {"c": cc, "c++": cxx, "python headers": str(header) if header.is_file() else None}


def _works(
    packages: dict[str, str | None],
    devices: list[dict[str, Any]],
    compilers: dict[str, str | None],
) -> dict[str, str]:
    """Feature -> "" if it would work here, otherwise what stands in the way."""
    gpu = _gpu(packages, devices, compilers)
    host = "" if compilers["c++"] else "no C++ compiler for Inductor's code on the CPU"
    return {
        "optimize on the CPU": _needs(packages, "torch", "networkx", "sympy"),
        "Triton kernels": gpu,
        "lowering='inductor'": gpu and host,  # on one device or the other
        "models by transformers": _needs(packages, "transformers"),
        "LoRA": _needs(packages, "peft"),
        "QLoRA": _needs(packages, "bitsandbytes"),
        "TRL's trainers": _needs(packages, "transformers", "trl"),
        "fusewright report": _needs(packages, "transformers", "rich"),
        "fusewright report --html": _needs(packages, "transformers", "jinja2"),
    }


def _needs(packages: dict[str, str | None], *names: str) -> str:
    return next((why for name in names if (why := obstacle(name, packages[name]))), "")


def _gpu(
    packages: dict[str, str | None],
    devices: list[dict[str, Any]],
    compilers: dict[str, str | None],
) -> str:
    cards = [d for d in devices if d["kind"] != "cpu"]
    if not cards:
        return "no GPU: the ops run as their PyTorch references"
    old = [d for d in cards if d["kind"] == "cuda" and tuple(d["capability"]) < _OLDEST_CAPABILITY]
    if old:
        return f"{old[0]['name']} is older than compute capability 7.5"
    if not compilers["c"]:
        return "no C compiler for Triton's launchers"
    if not compilers["python headers"]:
        return "no Python.h for Triton's launchers"
    return _needs(packages, "triton")
