"""A model is compiled by what it computes: no model type of transformers is named in the compiler.

A type name is looked for as a word of its own or the head of a class name, in any case and with any
separator. Type names that are ordinary words of English or of this trade are looked for only where
they would name a model: as a whole string, or as the head of a class name.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compiler", "patterns", "kernels", "runtime")
# fmt: off
ORDINARY = frozenset({
    "align", "aria", "bark", "beam", "bit", "bloom", "bros", "canary", "canine", "chameleon",
    "clap", "clip", "codegen", "ctrl", "dac", "doge", "electra", "ernie", "falcon", "flint",
    "flux", "funnel", "git", "granite", "helium", "informer", "janus", "led", "luke",
    "marian", "mimi", "moonshine", "opt", "pegasus", "perceiver", "persimmon", "phi", "radio",
    "rag", "reformer", "sam", "sew", "splinter", "swin", "table", "whisper",
})
# fmt: on


def _types() -> list[str]:
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


def _spelling(name: str) -> str:
    """llama4_text also as llama4-text and Llama4Text."""
    return r"[-_ ]?".join(re.escape(part) for part in re.split(r"[-_.]", name))


def _word(names: list[str]) -> re.Pattern[str]:
    any_of = "|".join(_spelling(n) for n in names)
    return re.compile(rf"(?<![A-Za-z0-9])(?:{any_of})(?![a-z0-9])", re.IGNORECASE)


def _head(names: list[str]) -> re.Pattern[str]:
    """LlamaAttention, GPT2Model: the name in capitals before another capitalised word."""
    any_of = "|".join(_spelling(n) for n in names)
    return re.compile(rf"(?<![A-Za-z0-9])(?=[A-Z])(?i:{any_of})(?=[A-Z][a-z])")


def mentions(text: str, names: list[str]) -> list[tuple[str, int]]:
    """(what was found, line) of every mention of a model in Python source."""
    ordinary = ORDINARY.intersection(names)
    patterns = (_head(names), _word([n for n in names if n not in ordinary]))
    found = [
        (match.group(), line)
        for line, content in enumerate(text.splitlines(), 1)
        for pattern in patterns
        for match in pattern.finditer(content)
    ]
    for node in ast.walk(ast.parse(text)):
        literal = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if literal and node.value.lower() in ordinary:
            found.append((node.value, node.lineno))
    return found


def test_the_search_finds_what_it_should() -> None:
    names = ["llama", "llama4_text", "clip", "opt", "gpt2", "phi", "bit"]
    assert mentions("x = 'llama'", names) and mentions("# as Llama does", names)
    assert mentions("class LlamaNorm: ...", names) and mentions("a = 'Llama4-Text'", names)
    assert mentions("if t == 'clip': pass", names) and mentions("PhiAttention = 1", names)
    assert mentions("# GPT-2 or gpt2", names)
    clean = "x = clip(opt)  # exact to the bit; Phi(x) + x phi(x); an option, optimize, Optional"
    assert not mentions(clean, names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_model_type_is_named(folder: str) -> None:
    names = _types()
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, line in mentions(path.read_text(), names)
    ]
    assert not found, "\n".join(found)
