"""One workload: prepare its peers side by side as memory allows, then time them strictly in turn.

Preparing is importing, building, and the first steps with their compilation. The timed phase is
rounds of turns: in each, one peer after the other runs a step that is not counted and a few that
are, while the others wait with their models on the GPU, so that all share clocks and heat.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from step_process import Clock, Settings, Worker
from step_work import Work, base

# These hold no logits. Ours neither, but its first step also holds the head against float64.
FUSED = ("liger", "layers+ligerflce", "cce", "unsloth")
USABLE = 0.92  # of the card's memory
PATIENCE = 60.0  # seconds that a turn may take whatever is left: a busy CPU is slow, not stuck
Say = Callable[[str], None]


@dataclass
class Job:
    """A peer of a workload on its way through the phases.

    Attributes:
        stages: commands that are left of its preparation, with their arguments.
        after: jobs that must be ready before this one starts.
        row: what is known so far; has "error" once something went wrong.
    """

    worker: Worker
    peak: float
    resting: float
    stages: list[tuple[str, dict[str, Any]]]
    after: list[Job] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    active: bool = False
    ready: bool = False

    @property
    def peer(self) -> str:
        return self.worker.peer

    @property
    def failed(self) -> bool:
        return "error" in self.row

    def fail(self, reason: str) -> None:
        """Give the peer up, with the reason for the table."""
        self.row.setdefault("error", reason)
        self.active = False
        self.worker.end()

    def take(self, answer: dict[str, Any], say: Say) -> None:
        """File an answer to a stage; start the next one or be ready."""
        if answer.get("error"):
            self.row |= answer
            self.fail(answer["error"])
            say(f"{self.worker.work} {self.peer}: {answer['error'][:200]}")
            return
        self.row |= answer
        if self.stages:
            action, arguments = self.stages.pop(0)
            self.worker.send(action, **arguments)
        else:
            self.active, self.ready = False, True


def jobs_for(work: Work, peers: Sequence[str], settings: Settings) -> list[Job]:
    """The processes of a workload, started: they import and wait."""
    jobs: list[Job] = []
    steps = {False: 3, True: 10}  # Unsloth's early steps can take seven times as long
    last = "gradients" if work.name == "C" else "warm"
    first: list[Job] = []
    if last == "gradients":
        worker = Worker(work.name, "fp32", settings)
        peak = 1.5 * work.peak[0]
        first = [Job(worker, peak, work.resting, [("build", {}), ("gradients", {})])]
        jobs += first
    for peer in peers:
        unsloth = base(peer) == "unsloth"
        after = list(first)
        if unsloth and work.family == "llama":
            saver = Job(
                Worker(work.name, "save", settings), work.resting, work.resting, [("save", {})]
            )
            jobs.append(saver)
            after.append(saver)
        warm = {"steps": steps[unsloth]} if last == "warm" else {}
        peak = work.peak[base(peer) in FUSED]
        worker = Worker(work.name, peer, settings)
        jobs.append(Job(worker, peak, work.resting, [("build", {}), (last, warm)], after))
    return jobs


def imported(jobs: Sequence[Job], clock: Clock, limit: float, say: Say) -> None:
    """Wait until every process has imported."""
    end = clock.spent + limit
    for job in jobs:
        if job.failed or "import_s" in job.row:
            continue
        answer = job.worker.wait(end - clock.spent)
        if answer is None:
            job.fail(f"did not import within {limit:.0f} s")
        elif "error" in answer:
            job.fail(answer["error"])
            say(f"{job.worker.work} {job.peer}: {answer['error'][:200]}")
        else:
            job.row |= answer


def groups(jobs: Sequence[Job], memory: float) -> list[list[Job]]:
    """Peers that fit on the card together.

    The resting memory of all plus what the largest takes in its turn must fit. Where that needs
    several groups, ours is in each of them: what the groups have in common.
    """
    anchor = next((j for j in jobs if base(j.peer) == "ours"), jobs[0])
    out: list[list[Job]] = []
    for job in (j for j in jobs if j is not anchor):
        if out and _together([*out[-1], job]) <= USABLE * memory:
            out[-1].append(job)
        else:
            out.append([anchor, job])
    return out or [[anchor]]


def _together(jobs: Sequence[Job]) -> float:
    return sum(j.resting for j in jobs) + max(j.peak - j.resting for j in jobs)


def prepare(
    group: Sequence[Job], memory: float, settings: Settings, clock: Clock, limit: float, say: Say
) -> None:
    """Run the stages of all, as many at once as memory and cores allow."""
    end = clock.spent + limit
    waiting = [j for j in group if not (j.failed or j.ready)]
    while True:
        for job in [j for j in waiting if not j.active]:
            failed = [j for j in job.after if j.failed]
            if failed:
                job.fail(f"{failed[0].peer}: {failed[0].row['error'][:200]}")
            elif all(j.ready for j in job.after) and _admits(job, group, memory, settings):
                job.active = True
                action, arguments = job.stages.pop(0)
                job.worker.send(action, **arguments)
        for job in [j for j in waiting if j.active]:
            answer = job.worker.poll()
            if answer is not None:
                job.take(answer, say)
                if job.ready and job.peer in ("fp32", "save"):
                    job.worker.end()
                    job.resting = 0.0
                if job.ready:
                    say(f"{job.worker.work} {job.peer}: ready, {_times(job.row)}")
        waiting = [j for j in waiting if not (j.failed or j.ready)]
        if not waiting:
            return
        if clock.spent > end:
            for job in waiting:
                job.fail(f"skipped: not ready within {limit:.0f} s")
                say(f"{job.worker.work} {job.peer}: {job.row['error']}")
            return
        time.sleep(0.01)


def _times(row: dict[str, Any]) -> str:
    shown = {k: row[k] for k in ("import_s", "build_s", "first_step_s", "save_s") if k in row}
    return ", ".join(f"{k} {v}" for k, v in shown.items())


def _admits(job: Job, group: Sequence[Job], memory: float, settings: Settings) -> bool:
    active = [j for j in group if j.active]
    held = sum(j.peak for j in active) + sum(j.resting for j in group if j.ready and not j.failed)
    alone = not active and not any(j.ready for j in group)
    return alone or (len(active) < settings.at_once and held + job.peak <= USABLE * memory)


def take_turns(
    group: Sequence[Job], rounds: int, turn: dict[str, Any], clock: Clock, limit: float
) -> int:
    """Rounds of turns, fewer if the time ends; returns how many."""
    end = clock.spent + limit
    longest = 0.0
    for done in range(rounds):
        if done and clock.spent + longest > end:
            return done
        began = clock.spent
        # Every other round backwards: no peer always follows the same one.
        for job in group if done % 2 == 0 else reversed(group):
            if job.failed:
                continue
            job.worker.send("turn", **turn)
            answer = job.worker.wait(max(PATIENCE, end - clock.spent))
            if answer is None:
                job.fail("a turn did not end in time")
            elif "error" in answer:
                job.row |= answer
                job.fail(answer["error"])
            else:
                job.turns.append(answer)
        longest = max(longest, clock.spent - began)
    return rounds


def ask(
    group: Sequence[Job], action: str, clock: Clock, limit: float, say: Say, each: float = 60
) -> None:
    """One command to one peer after the other, those left out that the time does not allow."""
    end = clock.spent + limit
    for job in group:
        if job.failed:
            continue
        if clock.spent > end:
            job.row[f"{action}_note"] = "skipped: no time left"
            continue
        job.worker.send(action)
        answer = job.worker.wait(each)
        if answer is None:
            job.fail(f"{action} did not end within {each:.0f} s")
        elif "error" in answer:
            job.row[f"{action}_note"] = answer["error"]
            say(f"{job.worker.work} {job.peer}, {action}: {answer['error'][:200]}")
        else:
            job.row |= answer


def finish(job: Job, work: Work, anchor: Job) -> None:
    """Medians over the turns, into the row; the anchor's over the same rounds beside them."""
    row = job.row
    times = [t for turn in job.turns for t in turn["ms"]]
    if not times:
        row.setdefault("error", "not timed: no time left")
        return
    row |= {
        "ms": statistics.median(times),
        "ms_min": min(times),
        "ms_max": max(times),
        "all_ms": [round(t, 3) for t in times],
        "tokens_s": work.tokens / statistics.median(times) * 1e3,
        "losses": job.turns[-1]["losses"],
        "loss_first": job.turns[-1]["losses"][0],
        "anchor_ms": statistics.median(t for turn in anchor.turns for t in turn["ms"]),
    }
    issued = [t for turn in job.turns for t in turn["issue_ms"]]
    if issued:
        row["issue_ms"] = statistics.median(issued)
        row["peak_gib"] = max(turn["peak_gib"] for turn in job.turns)
    if "profile" in row:
        row["idle"] = row["profile"]["idle"]
