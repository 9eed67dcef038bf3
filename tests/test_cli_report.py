"""``fusewright report``: answers for models of any size without weights, and clear refusals."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import models
import pytest
from typer.testing import CliRunner, Result

from fusewright import cli
from fusewright.compiler.explain import CoverageReport

ROOT = Path(__file__).resolve().parent.parent

# The largest there are, by their published shapes.
_LARGE = {
    "405B": (
        "llama",
        {
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
        {"rms_norm": 253, "add_rms_norm": 126, "rope": 252, "glu": 126, "linear_cross_entropy": 1},
        405.8e9,
    ),
    "235B experts": (
        "qwen3_moe",
        {
            "hidden_size": 4096,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
            "norm_topk_prob": True,
        },
        {
            "rms_norm": 377,
            "add_rms_norm": 94,
            "qk_norm_rope": 94,
            "rope": 188,
            "glu": 94,
            "linear_cross_entropy": 1,
        },
        235.1e9,
    ),
}
_SECONDS, _GIB = 60, 4


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


def _refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("fusewright: ")
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    models.config("llama").save_pretrained(folder)
    return folder


def test_a_folder_and_its_file(config: Path) -> None:
    for target in (config, config / "config.json"):
        result = _run(target)
        assert result.exit_code == 0, result.stderr
        assert "coverage 100% of sites" in result.stdout
        assert "rms_norm" in result.stdout and "where a step goes" in result.stdout


def test_json_alone_on_stdout(config: Path) -> None:
    result = _run(config, "--json", "--batch", 3, "--sequence", 20, "--dtype", "float32")
    found = json.loads(result.stdout)
    assert found.keys() == CoverageReport().to_dict().keys()
    assert found["counts"] == models.expected_counts("llama")
    assert found["target"]["batch"] == 3 and found["target"]["sequence"] == 20
    assert not found["notes"] and not found["eager_now"]


def test_it_agrees_with_the_optimised_model(config: Path) -> None:
    """The same model on real tensors has the same sites and costs."""
    import training

    import fusewright

    model = fusewright.optimize(models.build("llama"), lowering="fx")
    training.train_step(model, {k: v for k, v in models.batch().items() if k != "attention_mask"})
    real = fusewright.report(model)
    arguments = (config, "--json", "--batch", 2, "--sequence", 16, "--dtype", "float32")
    found = json.loads(_run(*arguments).stdout)
    assert found["totals"] == real.totals
    assert found["families"] == real.to_dict()["families"]
    assert found["layers"] == real.layers and found["parameters"] == real.parameters


def test_twice_the_sequence_is_twice_the_products(config: Path) -> None:
    def products(length: int) -> int:
        found = json.loads(_run(config, "--json", "--sequence", length).stdout)
        return sum(f["flops"] for f in found["families"] if f["family"] == "matrix products")

    assert products(128) == 2 * products(64) > 0


def test_adapters(config: Path) -> None:
    pytest.importorskip("peft")
    found = json.loads(_run(config, "--json", "--lora", 4).stdout)
    assert found["counts"]["lora"] == 7 * models.LAYERS
    assert 0 < found["parameters"]["trainable"] < found["parameters"]["total"] / 4


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "gemma2"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    models.config(name).save_pretrained(tmp_path)
    result = _run(tmp_path, "--json", "--sequence", 32)
    found = json.loads(result.stdout)
    assert found["counts"]["rms_norm"] and found["totals"]["flops"]
    assert not found["notes"] and not found["eager_now"]


def test_files(config: Path, tmp_path: Path) -> None:
    result = _run(config, "--html", tmp_path / "r.html", "--emit-repro", tmp_path / "cases")
    assert result.exit_code == 0
    assert "<!doctype html>" in (tmp_path / "r.html").read_text()
    assert not (tmp_path / "cases").exists()  # nothing is missed


def test_the_difference_of_targets_and_of_reports(config: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(_run(config, "--json").stdout)
    models.config("llama", 3).save_pretrained(tmp_path / "b")
    result = _run("--diff", tmp_path / "a.json", tmp_path / "b")
    assert result.exit_code == 0 and "rms_norm: 5 -> 7 rewritten" in result.stdout
    found = json.loads(_run("--json", "--diff", config, tmp_path / "b").stdout)
    assert found["counts"]["glu"] == [2, 3]
    assert "no difference" in _run("--diff", tmp_path / "a.json", tmp_path / "a.json").stdout


def test_an_unknown_model_type() -> None:
    _refused(_run("lama"), "unknown model type 'lama'", "did you mean llama")


def test_no_such_file() -> None:
    _refused(_run("./nothing.json"), "no such file")


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    _refused(_run(tmp_path), "no config.json")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "JSON"),
        ("[]", "model_type"),
        ('{"hidden_size": 3}', "model_type"),
        ('{"model_type": "lama"}', "unknown model type 'lama'"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "c.C"}}', "--trust-remote-code"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config"),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}', "config"),
        ('{"model_type": "vit"}', "no language model"),
    ],
)
def test_a_config_that_does_not_build(content: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    _refused(_run(tmp_path), part)


def test_a_repository_while_offline() -> None:
    _refused(_run("nobody/no-such-model"), "nobody/no-such-model", "local config.json")


@pytest.mark.parametrize(
    "arguments",
    [[], ["llama", "--dtype", "int8"], ["llama", "--diff", "a", "b"]],
    ids=["nothing", "dtype", "both"],
)
def test_a_question_that_makes_no_sense(arguments: list[str]) -> None:
    _refused(_run(*arguments))


@pytest.mark.parametrize(("package", "extra"), [("transformers", "hf"), ("peft", "hf")])
def test_a_missing_extra(
    package: str, extra: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # its import now raises ImportError
    _refused(_run(config, "--lora", 4), f"pip install 'fusewright[{extra}]'")


def test_a_missing_page_maker(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = _run(config, "--html", tmp_path / "r.html")
    assert result.exit_code == 2 and "pip install 'fusewright[report]'" in result.stderr


@pytest.mark.parametrize("size", list(_LARGE))
def test_the_largest_in_a_minute_and_four_gib(size: str, tmp_path: Path) -> None:
    kind, shape, counts, parameters = _LARGE[size]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **shape}))
    done, seconds, peak = _measured(tmp_path)
    found: dict[str, Any] = json.loads(done)
    print(f"{size}: {seconds:.1f} s, {peak / 2**30:.2f} GiB")
    assert found["counts"] == counts
    assert found["parameters"]["total"] == pytest.approx(parameters, rel=1e-3)
    assert not found["notes"] and not found["eager_now"]
    assert seconds < _SECONDS and peak < _GIB * 2**30


def _measured(target: Path) -> tuple[str, float, int]:
    """(stdout, seconds, peak bytes) of a report in a process of its own."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fusewright", "report", str(target), "--json"],
        cwd=target,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return done.stdout, time.perf_counter() - started, peak
