"""A whole training step, ours and the peers', interleaved on one GPU, each in a process of its own.

    python bench/bench_step.py W1 W2n --peers eager,layers,layers+ligerflce,liger,ours \
        --seconds 400 OUT.json

The workloads are in step_work.py, the peers in step_models.py, their packages come from
bench/carry.sh. The run holds to its seconds: what does not fit is left out, and its line says so.
OUT.json (results/step-<device>.json by default) is written after every workload, with a plot beside
it; the table is printed last. --profile writes the kernels of ours and of the best peer as well.
--tiny on a machine without a GPU is a dry run of the whole.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step_phases import USABLE, Job, ask, finish, groups, imported, jobs_for, prepare, take_turns
from step_process import ROOT, Clock, Settings, Worker
from step_work import WORK, Work, base, workload

PEERS = ("eager", "layers", "layers+ligerflce", "liger", "ours")
IMPORT_LIMIT = 90.0
MANY_CORES = 8  # with fewer, the next workload's imports would slow this one's compilation


class Run:
    """A run of several workloads, and what it has measured."""

    def __init__(self, given: argparse.Namespace, settings: Settings) -> None:
        self.given, self.settings = given, settings
        self.clock = Clock(given.seconds)
        self.machine: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.floors: dict[str, Any] = {}
        self.notes: list[str] = []
        self.started: dict[str, list[Job]] = {}
        self.importing: list[Job] = []

    def say(self, line: str) -> None:
        """A line of progress, with the seconds since the start."""
        print(f"[{self.clock.spent:5.0f} s] {line}", flush=True)

    def start(self, name: str) -> list[Job]:
        """The workload's processes, importing; started once."""
        if name not in self.started:
            work = workload(name, self.settings.tiny)
            self.started[name] = jobs_for(work, self.given.peers, self.settings)
            if self.wants_floor(work):
                self.started[name].append(
                    Job(Worker(name, "floor", self.settings), 0.0, 0.0, [("floor", {})])
                )
        return self.started[name]

    def wants_floor(self, work: Work) -> bool:
        return not (self.given.no_floor or self.settings.cpu or work.name == "C")

    def all(self) -> None:
        """Every workload in order, each with its share of the time that is left."""
        names = self.given.works
        for at, name in enumerate(names):
            weights = [WORK[n].weight for n in names[at:]]
            share = (self.clock.left - 8) * weights[0] / sum(weights)
            ahead = at + 1 < len(names) and self.settings.cores >= MANY_CORES
            following = names[at + 1] if ahead else None
            if share < 15:
                self.notes.append(f"{name}: skipped, no time left")
                continue
            try:
                self.one(name, share, following)
            finally:
                for job in self.started[name]:
                    job.worker.end()
            self.write()

    def one(self, name: str, share: float, following: str | None) -> None:
        """One workload in ``share`` seconds; the next one's processes import meanwhile."""
        work, began = workload(name, self.settings.tiny), self.clock.spent
        jobs = self.start(name)
        imported(jobs, self.clock, min(IMPORT_LIMIT, share / 2), self.say)
        self.importing = self.start(following) if following is not None else []
        self.find_machine(jobs)
        memory = self.machine.get("memory_gib") or math.inf
        own = [j for j in jobs if j.peer in ("fp32", "save")]
        peers = [j for j in jobs if j.peer in self.given.peers and not j.failed]
        floor = [j for j in jobs if j.peer == "floor"]
        parts = groups(peers, memory) if peers else []
        if len(parts) > 1:
            text = " | ".join(", ".join(j.peer for j in part) for part in parts)
            self.notes.append(f"{name}: in groups, the first of each repeated: {text}")
        for at, part in enumerate(parts):
            left = share - (self.clock.spent - began)
            whole = [*own, *part] if at == 0 else part
            self.group(work, whole, left / (len(parts) - at), len(parts) > 1)
        for job in jobs:
            if job.peer in self.given.peers:
                self.rows.append({"work": name, "peer": job.peer} | job.row)
            if job.peer != "floor":
                job.worker.end()
        left = self.clock.left - 8
        if floor and left < 6:
            self.notes.append(f"{name}: no floor, the time was up")
        elif floor:
            ask(floor, "floor", self.clock, left, self.say, each=left)
            self.floors[name] = floor[0].row

    def group(self, work: Work, part: Sequence[Job], seconds: float, repeated: bool) -> None:
        """Prepare, time and profile the peers that are on the card together."""
        began, count = self.clock.spent, len(part)
        reserve = 4.0 + work.weight * count * 4.0 + (8.0 if self.wants_floor(work) else 0.0)
        memory = self.machine.get("memory_gib") or math.inf
        prepare(
            part, memory, self.settings, self.clock, max(seconds / 2, seconds - reserve), self.say
        )
        ready = [j for j in part if j.ready and j.peer in self.given.peers and not j.failed]
        if work.name == "C" or not ready:
            return
        imported(self.importing, self.clock, 30.0, self.say)  # not while others are timed
        anchor = next((j for j in ready if base(j.peer) == "ours"), ready[0])
        before = len(anchor.turns)
        left = seconds - (self.clock.spent - began)
        given = self.given
        crowded = repeated or sum(j.peak for j in ready) > USABLE * memory
        turn = {"steps": given.steps, "settle": given.settle, "release": crowded}
        rounds = take_turns(ready, given.rounds, turn, self.clock, 0.6 * left)
        if rounds < given.rounds:
            self.notes.append(f"{work.name}: {rounds} of {given.rounds} rounds, the time was up")
        left = seconds - (self.clock.spent - began)
        if self.settings.cpu:
            ask(ready, "memory", self.clock, left, self.say)
        elif not given.no_kernels:
            fresh = [j for j in ready if "profile" not in j.row]
            ask(fresh, "profile", self.clock, left, self.say)
        shared = Job(anchor.worker, 0, 0, [], turns=anchor.turns[before:])
        for job in ready:
            finish(job, work, shared if job is not anchor else anchor)
            if job is not anchor:
                job.worker.end()

    def find_machine(self, jobs: Sequence[Job]) -> None:
        """Ask one process for the device and its memory, once; versions from all that have more."""
        for job in jobs:
            if job.failed or (self.machine and job.peer == "floor"):
                continue
            if self.machine and base(job.peer) not in ("liger", "unsloth", "cce"):
                continue
            job.worker.send("machine")
            answer = job.worker.wait(60) or {"error": "no answer"}
            if "error" in answer:
                job.fail(answer["error"])
                continue
            versions = self.machine.get("versions", {}) | answer["versions"]
            self.machine = answer | {"versions": versions, "cores": self.settings.cores}

    def result(self) -> dict[str, Any]:
        """Everything, for the file."""
        given = self.given
        return {
            "command": "python bench/bench_step.py " + " ".join(map(portable, given.typed)),
            "machine": self.machine,
            "protocol": {
                "rounds": given.rounds,
                "steps_a_turn": given.steps,
                "uncounted_steps_a_turn": given.settle,
                "prepared_at_once": self.settings.at_once,
                "first_step_s": "with other peers compiling at the same time"
                if self.settings.at_once > 1 else "alone",
                "copy": "memcpy, memset, and aten's copies and concatenations",
            },
            "rows": self.rows,
            "floors": self.floors,
            "notes": self.notes,
            "seconds": round(self.clock.spent, 1),
        }  # fmt: skip

    def out(self) -> Path:
        """The file asked for, or results/step-<device>.json."""
        if self.given.out is not None:
            return Path(self.given.out)
        device = str(self.machine.get("device", "unknown")).lower().split()
        word = next((w for w in device if any(c.isdigit() for c in w)), device[-1])
        return ROOT / "bench" / "results" / f"step-{word}.json"

    def write(self) -> None:
        """The file, after every workload: what is measured is not lost."""
        out = self.out()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(portable(json.dumps(self.result(), indent=1, default=str)) + "\n")


def portable(text: str) -> str:
    """The text with the last two parts of every absolute path: machines' folders say nothing."""
    return re.sub(r"(?<![\w.])/(?:[\w.\-]+/)+([\w.\-]+/[\w.\-]+)", r"\1", text)


def arguments(typed: Sequence[str]) -> argparse.Namespace:
    """The command line; the last word is the file when it ends in .json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("works", nargs="+", metavar="WORKLOAD", help=", ".join(WORK))
    parser.add_argument("--peers", type=lambda t: t.split(","), default=list(PEERS))
    parser.add_argument("--seconds", type=float, default=400.0, help="for everything")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn")
    parser.add_argument("--settle", type=int, default=2, help="uncounted steps of a turn")
    parser.add_argument("--profile", action="store_true", help="write the kernels of two peers")
    parser.add_argument("--no-kernels", action="store_true", help="no profiled step at all")
    parser.add_argument("--no-floor", action="store_true")
    parser.add_argument("--serial", action="store_true", help="prepare one peer at a time")
    parser.add_argument("--tiny", action="store_true", help="a dry run with tiny models")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--carry", type=Path, default=ROOT / ".carry", help="peers' packages")
    parser.add_argument("--scratch", type=Path, help="for caches and weights; removed at the end")
    given = parser.parse_intermixed_args(list(typed))
    given.typed = list(typed)
    files = [w for w in given.works if w.endswith(".json")]
    given.out = files[0] if files else None
    given.works = list(dict.fromkeys(w for w in given.works if not w.endswith(".json")))
    for name in given.works:
        if name not in WORK:
            parser.error(f"unknown workload {name!r}; there are {', '.join(WORK)}")
    return given


def scratch(asked: Path | None, needs: float) -> Path:
    """A new folder: in memory if that has room for ``needs`` GiB, else where temporary files go."""
    memory = Path("/dev/shm")
    where = asked
    if asked is None and memory.is_dir() and shutil.disk_usage(memory).free > needs * 2**30:
        where = memory
    if where is not None:
        where.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="step-", dir=where))


def main(typed: Sequence[str]) -> Run:
    """Measure, write, print."""
    given = arguments(typed)
    cpu = given.cpu or not (shutil.which("nvidia-smi") or list(Path("/dev").glob("nvidia[0-9]*")))
    needs = 40 if "unsloth" in [base(p) for p in given.peers] else 6
    folder = scratch(given.scratch, needs)
    settings = Settings(folder, given.carry, given.tiny, cpu, serial=given.serial)
    run = Run(given, settings)
    try:
        run.all()
    finally:
        for jobs in run.started.values():
            for job in jobs:
                job.worker.end()
        run.write()
        shutil.rmtree(folder, ignore_errors=True)
    import step_report  # matplotlib and torch: not before the processes are started

    step_report.present(run.result(), run.out(), given.profile)
    return run


if __name__ == "__main__":
    main(sys.argv[1:])
