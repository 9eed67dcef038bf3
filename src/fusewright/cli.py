"""The command line: ``fusewright report``, ``fusewright bench`` and ``fusewright doctor``.

Answers go to stdout; everything else, and the one line that says what was wrong with a question,
goes to stderr. Exit code 2 is a question that cannot be answered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fusewright.compiler.explain import CoverageReport
    from fusewright.targets import Question

_DTYPES = ("bfloat16", "float16", "float32")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A graph compiler for fine-tuning: ask what it would do, before there is a GPU.",
)

_Target = Annotated[str, typer.Argument(help="a model type, a config.json, or a folder with one")]
_Batch = Annotated[int, typer.Option(min=1, help="rows of the batch")]
_Sequence = Annotated[
    int, typer.Option(min=0, help="tokens a row; 0: as the config allows, at most 4096")
]


@app.command()
def report(
    target: _Target = "",
    batch: _Batch = 1,
    sequence: _Sequence = 0,
    dtype: Annotated[
        str, typer.Option(help=", ".join(_DTYPES), autocompletion=lambda: list(_DTYPES))
    ] = "bfloat16",
    lora: Annotated[int, typer.Option(min=0, help="adapters of this rank on every linear")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout, nothing else")] = False,
    html: Annotated[Path | None, typer.Option(help="write the report as one HTML page")] = None,
    diff: Annotated[
        tuple[str, str] | None, typer.Option(help="two targets or report JSONs to compare")
    ] = None,
    emit_repro: Annotated[
        Path | None, typer.Option(help="a folder for one pytest file per kind of miss")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the code that a config names")
    ] = False,
) -> None:
    """What fires in a model, what is missed and why, and what share of a step it is: no weights."""
    with _errors():
        question = _question(batch, sequence, dtype, lora, trust_remote_code)
        if bool(target) == (diff is not None):
            _refuse("give a TARGET, or --diff A B, and not both")
        if diff is not None:
            _only_without(html, emit_repro)
            first, second = (_answer(t, question) for t in diff)
            changes = first.diff(second)
            print(changes.to_json() if as_json else changes)
            return
        answer = _answer(target, question)
        _write(answer, html, emit_repro)
        if as_json:
            print(answer.to_json())
        else:
            _show(answer)


@app.command()
def plan(
    target: _Target,
    batch: _Batch = 1,
    sequence: _Sequence = 0,
    budget: Annotated[str, typer.Option(help="22GiB, 90%, bytes, or auto")] = "auto",
    device: Annotated[str, typer.Option(help="h200, h100, a100, a100-40gb, or a JSON file")] = "",
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw-8bit, sgd or sgd-momentum")
    ] = "adamw",
    dtype: Annotated[str, typer.Option(help=", ".join(_DTYPES))] = "bfloat16",
    lora: Annotated[int, typer.Option(min=0, help="adapters of this rank on every linear")] = 0,
    base: Annotated[str, typer.Option(help="nf4 or fp4: 4-bit weights under the adapters")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout, nothing else")] = False,
    png: Annotated[Path | None, typer.Option(help="write the timeline as a picture")] = None,
) -> None:
    """The fastest step under a memory budget: what is kept, what runs again, peak and time."""
    from fusewright import planned

    with _errors():
        _question(batch, sequence, dtype, lora, False)
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                options = {"device": device, "optimizer": optimizer, "lora": lora, "dtype": dtype}
                options |= {"base": base}
                made = planned.plan(target, batch, sequence, _size(budget), **options)
            except ValueError as error:
                if str(error).startswith("FUSEWRIGHT_"):
                    raise
                _refuse(str(error))
        if png is not None:
            from fusewright.compiler.planning.chart import picture

            try:
                picture(made, png)
            except ModuleNotFoundError:
                _refuse("matplotlib is not installed: pip install 'fusewright[bench]'")
            print(f"wrote {png}", file=sys.stderr)
        print(made.to_json() if as_json else made)


def _size(budget: str) -> str | float:
    """A bare number up to 1 is a share of the device."""
    with contextlib.suppress(ValueError):
        share = float(budget)
        return share if 0 < share <= 1 and "." in budget else budget
    return budget


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout, nothing else")] = False,
) -> None:
    """What this machine has, and what would work on it."""
    from fusewright.doctor import findings

    found = findings()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = Console(highlight=False)
    console.print(f"Python {found['python']}, {found['platform']}")
    for part in ("packages", "compilers"):
        table = Table(title=part, title_justify="left", show_header=False, show_edge=False)
        for name, have in found[part].items():
            table.add_row(name, have or "not found")
        console.print(table)
    for device in found["devices"]:
        console.print(", ".join(f"{k} {v}" for k, v in device.items()), markup=False)
    for feature, obstacle in found["works"].items():
        console.print(f"{'no ' if obstacle else 'yes'} {feature}{obstacle and ': ' + obstacle}")


@app.command()
def bench(
    target: _Target,
    batch: _Batch = 1,
    sequence: _Sequence = 0,
    dtype: Annotated[
        str, typer.Option(help=", ".join(_DTYPES), autocompletion=lambda: list(_DTYPES))
    ] = "bfloat16",
    lora: Annotated[int, typer.Option(min=0, help="adapters of this rank on every linear")] = 0,
    layers: Annotated[int, typer.Option(min=0, help="the first so many layers; 0: all")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="timed steps of each")] = 10,
    lowering: Annotated[str, typer.Option(help="auto, fx, inductor")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout, nothing else")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the code that a config names")
    ] = False,
) -> None:
    """Time a training step here, eager against optimised, with random weights."""
    with _errors():
        if lowering not in ("auto", "fx", "inductor"):
            _refuse(f"--lowering must be one of auto, fx, inductor; got {lowering!r}")
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        asked = _question(batch, sequence, dtype, lora, trust_remote_code)
        with contextlib.redirect_stdout(sys.stderr):
            from fusewright.bench import compare
            from fusewright.targets import build

            built = build(target, dataclasses.replace(asked, device=device, layers=layers))
            found = built.about | compare(built.model, built.inputs, steps, lowering)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show_times(found)


def _show_times(found: dict[str, Any]) -> None:
    """The comparison as a table of a row for each, and a line on what was rewritten."""
    columns = ("milliseconds", "tokens_per_second", "step_gib", "first_step_seconds", "loss")
    table = Table("", *(name.replace("_", " ") for name in columns), show_edge=False)
    for name in ("eager", "optimised"):
        row = (found[name][column] for column in columns)
        table.add_row(name, *("" if v is None else f"{v:,.4g}" for v in row))
    console = Console(width=None if sys.stdout.isatty() else 118, highlight=False)
    console.print(f"{found['model']}, {found['batch']} x {found['sequence']}, {found['device']}")
    console.print(table)
    counts = ", ".join(f"{name} {count}" for name, count in found["counts"].items())
    console.print(f"{found['speedup']:.2f} times as fast; rewritten: {counts or 'nothing'}")


def _question(batch: int, sequence: int, dtype: str, lora: int, trust: bool) -> Question:
    from fusewright.targets import Question

    if dtype not in _DTYPES:
        _refuse(f"--dtype must be one of {', '.join(_DTYPES)}; got {dtype!r}")
    return Question(batch, sequence, dtype, lora, trust)


def _only_without(html: Path | None, emit_repro: Path | None) -> None:
    if html is not None or emit_repro is not None:
        _refuse("--html and --emit-repro are about one target; --diff compares two")


def _answer(target: str, question: Question) -> CoverageReport:
    """The report of a target, or the one that a JSON file holds."""
    from fusewright.compiler.explain import CoverageReport

    path = Path(target).expanduser()
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        with contextlib.suppress(ValueError):  # then it is a config, or nothing that we know
            return CoverageReport.from_json(text)
    from fusewright import targets
    from fusewright.compiler.abstract import observe
    from fusewright.patterns import DEFAULT

    started = time.perf_counter()
    # What libraries print while they work is not the answer.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = targets.build(target, question)
        answer = observe(built.model, DEFAULT, built.inputs)
    answer.target = built.about | {"seconds": round(time.perf_counter() - started, 1)}
    return answer


def _write(answer: CoverageReport, html: Path | None, emit_repro: Path | None) -> None:
    if html is not None:
        try:
            answer.to_html(html)
        except ModuleNotFoundError as error:
            _refuse(str(error))
        print(f"wrote {html}", file=sys.stderr)
    if emit_repro is not None:
        for path in answer.emit_repro(emit_repro):
            print(f"wrote {path}", file=sys.stderr)


def _show(answer: CoverageReport) -> None:
    from fusewright.compiler.tables import write

    write(answer, Console(width=None if sys.stdout.isatty() else 118))


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn what is wrong with a question into one line and exit code 2."""
    from fusewright.compiler.regions import NothingToOptimize
    from fusewright.targets import BadTarget

    try:
        yield
    except (BadTarget, NothingToOptimize) as error:
        _refuse(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _refuse(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        if not str(error).startswith("FUSEWRIGHT_"):
            raise
        _refuse(str(error))


def _refuse(line: str) -> Any:
    print(f"fusewright: {' '.join(line.split())}", file=sys.stderr)
    raise typer.Exit(2)
