"""The driver's side of a worker process: start it, send commands, collect answers, end it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from step_work import base, options

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
# Folders under .carry/ (bench/carry.sh) that a peer's process finds on its path.
_PACKAGES = {
    "liger": ("liger",),
    "layers+ligerflce": ("liger",),
    "cce": ("cce",),
    "unsloth": ("unsloth/site", "bnb"),
}


@dataclass(frozen=True)
class Settings:
    """What every process of a run shares.

    Attributes:
        scratch: caches, logs and saved weights; large where Unsloth is measured.
        carry: the peers' packages.
        tiny: a dry run with tiny models.
        cpu: stay on the CPU even if there is a GPU.
        cores: of this machine.
        serial: prepare one peer at a time.
    """

    scratch: Path
    carry: Path
    tiny: bool = False
    cpu: bool = False
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    serial: bool = False

    @property
    def at_once(self) -> int:
        """How many peers are prepared side by side."""
        return 1 if self.serial else max(1, self.cores // 2)


class Worker:
    """A process that runs step_worker.py."""

    def __init__(self, work: str, peer: str, settings: Settings) -> None:
        self.work, self.peer = work, peer
        name = f"{work}-{peer}".translate(str.maketrans("+:=", "___"))
        folder = settings.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        spec = {
            "work": work, "peer": peer, "tiny": settings.tiny, "cpu": settings.cpu,
            "scratch": str(settings.scratch),
        }  # fmt: skip
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(BENCH / "step_worker.py"), json.dumps(spec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                cwd=folder, env=_environment(peer, work, folder, settings),
                start_new_session=True,
            )  # fmt: skip
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self.ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        tail = self.log.read_text(errors="replace")[-400:]
        self._answers.put({"error": f"the process ended: {tail}", "ended": True})

    def send(self, action: str, **arguments: Any) -> None:
        """Give a command; its answer is fetched by ``poll`` or ``wait``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": action} | arguments) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reader reports the end

    def poll(self) -> dict[str, Any] | None:
        """The next answer if it is there."""
        return self.wait(0)

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """The next answer, or None when it does not come in time."""
        try:
            answer = self._answers.get(timeout=max(seconds, 0.001))
        except queue.Empty:
            return None
        self.ended = self.ended or bool(answer.pop("ended", False))
        return answer

    def end(self) -> None:
        """End the process and what it started; its memory on the GPU is free afterwards."""
        self.ended = True
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()


def _environment(peer: str, work: str, folder: Path, settings: Settings) -> dict[str, str]:
    """Empty caches of its own, no network, and no other peer's packages on the path."""
    packages = list(_PACKAGES.get(base(peer), ()))
    if work == "W4" and "bnb" not in packages:
        packages.append("bnb")
    carry = settings.carry.resolve()
    if "unsloth/site" in packages:
        carry = _unpacked(settings, carry)
    paths = [ROOT / "src", BENCH] + [carry / p for p in packages]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    threads = settings.cores if settings.serial else max(1, settings.cores // 4)
    env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    if settings.tiny:
        env["STEP_BACKEND"] = "aot_eager"
    disabled = options(peer).get("disable")
    if disabled:
        env["FUSEWRIGHT_DISABLE"] = disabled.replace("+", ",")
    return env


def _unpacked(settings: Settings, carry: Path) -> Path:
    """A folder like ``carry`` with unsloth/site.tgz unpacked and the others linked."""
    folder = settings.scratch / "carry"
    archive = carry / "unsloth" / "site.tgz"
    if not (folder / "unsloth" / "site").exists() and archive.exists():
        (folder / "unsloth").mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as packed:
            packed.extractall(folder / "unsloth", filter="data")
        (folder / "bnb").symlink_to(carry / "bnb")
    return folder


class Clock:
    """The time that a run may take."""

    def __init__(self, seconds: float) -> None:
        self._began, self._seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        """Seconds until the run must have ended."""
        return self._seconds - self.spent

    @property
    def spent(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began
