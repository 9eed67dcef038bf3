"""Write each stage of a region as readable Python, where FUSEWRIGHT_DUMP asks for it."""

from __future__ import annotations

import sys

from torch import fx

from fusewright.compiler.config import Environment
from fusewright.compiler.records import GraphRecord


class Writer:
    """Writes one region's stages under ``<dump>/<index>_<kind>_<class>/`` and prints by level."""

    def __init__(self, environment: Environment, record: GraphRecord, index: int) -> None:
        self.environment, self.record = environment, record
        self.folder = None
        if environment.dump is not None:
            self.folder = environment.dump / f"{index:02d}_{record.kind}_{record.region}"
            self.folder.mkdir(parents=True, exist_ok=True)

    def graph(self, stage: str, gm: fx.GraphModule) -> None:
        """Record the graph after one stage."""
        if self.folder is None and self.environment.debug < 3:
            return
        text = source(gm)
        if self.folder is not None:
            (self.folder / f"{stage}.py").write_text(text)
        if self.environment.debug >= 3:
            print(f"# {self.record.region}: {stage}\n{text}", file=sys.stderr)

    def done(self) -> None:
        """Print the region's summary line, and its rows at level 2."""
        if self.environment.debug < 1:
            return
        record = self.record
        print(
            f"fusewright: {record.kind} {record.region}: {len(record.matches)} rewritten, "
            f"{len(record.misses)} missed, lowering {record.lowering}, "
            + ", ".join(f"{k} {v:.2f} s" for k, v in record.seconds.items()),
            file=sys.stderr,
        )
        if self.environment.debug >= 2:
            for match in record.matches:
                print(f"  fired  {match.pattern:24} {match.location}", file=sys.stderr)
            for miss in record.misses:
                print(f"  missed {miss.pattern:24} {miss.location}: {miss.reason}", file=sys.stderr)


def source(gm: fx.GraphModule) -> str:
    """The graph as Python, with the user's file, line and code as comments."""
    return str(gm.graph.python_code("self", verbose=True).src)
