"""The training-step benchmark: its parts on their own, and a dry run of the whole on the CPU."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(autouse=True)
def _bench_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def _module(name: str) -> Any:
    return importlib.import_module(name)


class FakeWorker:
    """A worker that answers from a list, without a process."""

    def __init__(self, peer: str, answers: list[dict[str, Any]] | None = None) -> None:
        self.work, self.peer, self.ended = "W1", peer, False
        self.answers = list(answers or [])
        self.sent: list[str] = []

    def send(self, action: str, **_: Any) -> None:
        self.sent.append(action)

    def poll(self) -> dict[str, Any] | None:
        return self.wait(0)

    def wait(self, _: float) -> dict[str, Any] | None:
        return self.answers.pop(0) if self.answers else None

    def end(self) -> None:
        self.ended = True


def _jobs(work: str, *peers: str) -> list[Any]:
    phases, w = _module("step_phases"), _module("step_work").workload(work)
    return [
        phases.Job(FakeWorker(p), w.peak[p in phases.FUSED], w.resting, [("build", {})])
        for p in peers
    ]


def test_the_weights_of_the_layers_are_those_of_the_real_models() -> None:
    work = _module("step_work")
    for name, billions in (("W1", 0.973), ("W2", 6.98)):
        of = work.workload(name)
        one = sum(i * o * n for i, o, n in work.linears(of))
        assert one * of.shape["num_hidden_layers"] / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_peer_and_its_options() -> None:
    work = _module("step_work")
    assert work.base("ours:lowering=fx:verify=off") == "ours"
    assert work.base("layers+ligerflce+amp") == "layers+ligerflce"
    assert work.options("ours:lowering=fx:verify=off") == {"lowering": "fx", "verify": "off"}


def test_no_folder_of_a_machine_is_written() -> None:
    portable = _module("bench_step").portable
    assert portable("at /opt/x/lib/site-packages/peft/layer.py:7") == "at peft/layer.py:7"
    assert portable("4.2 TB/s, and/or, a/b/c.py") == "4.2 TB/s, and/or, a/b/c.py"


def test_an_unknown_workload_is_refused() -> None:
    with pytest.raises(ValueError, match="W9.*W1"):
        _module("step_work").workload("W9")
    with pytest.raises(SystemExit):
        _module("bench_step").arguments(["W9"])


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopA_NTN", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("triton_red_fused__to_copy_add_mm_mean_mul_pow_rsqrt_3", "pointwise"),
        ("triton_per_fused__log_softmax_nll_loss_forward_7", "loss"),
        ("loss_and_gradient_in_place", "loss"),
        ("norm_backward", "pointwise"),
        ("glu_forward", "pointwise"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "copy"),
        ("kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantise"),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>", "optimizer"),
    ],
)
def test_a_kernel_has_its_class(kernel: str, kind: str) -> None:
    assert _module("step_profile").kind_of(kernel) == kind


def test_overlapping_kernels_are_busy_once() -> None:
    profile = _module("step_profile")
    events = [(0, 1_000_000, "norm_forward"), (500_000, 1_000_000, "Memcpy DtoH"),
              (3_000_000, 1_000_000, "nvjet")]  # fmt: skip
    out = profile.summary(events, -1_000_000)
    assert out["idle"] == pytest.approx(0.5) and out["span_ms"] == pytest.approx(5.0)
    assert out["busy_ms"] == pytest.approx(2.5)
    assert out["kernels"] == 3 and out["launches"] == 2
    assert out["class_ms"]["gemm"] == pytest.approx(1.0)
    assert sum(out["share"].values()) == pytest.approx(1.0, abs=1e-3)


def test_the_last_of_several_steps_is_told_of() -> None:
    profile = _module("step_profile")
    steps = [[(t, 40, "nvjet"), (t + 50, 20, "norm_forward"), (t + 75, 5, "spin_kernel(long)")]
             for t in (0, 100, 205)]  # fmt: skip
    events, began = profile.last_step([e for step in reversed(steps) for e in step])
    assert began == 180 and sorted(events) == steps[-1][:2]


def test_groups_fit_and_share_ours() -> None:
    phases = _module("step_phases")
    peers = ("eager", "layers", "layers+ligerflce", "liger", "ours")
    assert len(phases.groups(_jobs("W2n", *peers), 139.8)) == 1
    small = phases.groups(_jobs("W2n", *peers), 79.1)
    assert len(small) > 1 and all(g[0].peer == "ours" for g in small)
    assert sorted(j.peer for g in small for j in g[1:]) == sorted(peers[:-1])
    for group in small:
        largest = max(j.peak - j.resting for j in group)
        assert sum(j.resting for j in group) + largest <= 0.92 * 79.1


def test_a_peer_that_is_not_ready_in_time_is_left_out() -> None:
    phases, process = _module("step_phases"), _module("step_process")
    quick, slow = _jobs("W1", "eager", "ours")
    quick.worker.answers = [{"build_s": 1.0}]
    settings = process.Settings(Path("unused"), Path("unused"), cores=4)
    lines: list[str] = []
    phases.prepare([quick, slow], 140.0, settings, process.Clock(60), 0.2, lines.append)
    assert quick.ready and not slow.ready
    assert "not ready" in slow.row["error"] and slow.worker.ended


def test_memory_admits_one_where_two_do_not_fit() -> None:
    phases, process = _module("step_phases"), _module("step_process")
    jobs = _jobs("W2n", "eager", "layers")
    settings = process.Settings(Path("unused"), Path("unused"), cores=16)
    phases.prepare(jobs, 60.0, settings, process.Clock(60), 0.1, lambda _: None)
    assert jobs[0].worker.sent == ["build"] and jobs[1].worker.sent == []


def test_turns_alternate_and_medians_are_over_all_of_them() -> None:
    phases, process, work = map(_module, ("step_phases", "step_process", "step_work"))
    jobs = _jobs("W1", "eager", "ours")
    for job, scale in zip(jobs, (2.0, 1.0), strict=True):
        job.worker.answers = [
            {"ms": [scale * t, scale * 9], "issue_ms": [1.0, 1.0], "peak_gib": t, "losses": [12.0]}
            for t in (1.0, 9.0, 9.0)
        ]
    assert phases.take_turns(jobs, 3, {"steps": 2}, process.Clock(60), 30) == 3
    for job in jobs:
        phases.finish(job, work.workload("W1"), jobs[1])
    assert [j.row["ms"] for j in jobs] == [18.0, 9.0]
    assert jobs[0].row["anchor_ms"] == 9.0 and jobs[0].row["peak_gib"] == 9.0


def test_a_plot_and_two_profiles_from_a_result(tmp_path: Path) -> None:
    report = _module("step_report")
    rows = [
        {"work": "W1", "peer": p, "ms": ms, "ms_min": ms - 1, "ms_max": ms + 2, "anchor_ms": 80.0,
         "tokens_s": 8192 / ms * 1e3, "losses": [12.0] * 13, "loss_first": 12.0,
         "profile": _module("step_profile").summary([(0, 1000, "nvjet")], 0)}
        for p, ms in (("eager", 150.0), ("liger", 110.0), ("ours", 80.0))
    ]  # fmt: skip
    result = {"rows": rows, "floors": {"W1": {"floor_ms": 67.0, "gemm_ms": 56.0, "adamw_ms": 0.0,
              "attention_ms": 11.0, "copy_tb_s": 4.2, "left_out": "x"}}, "notes": [], "seconds": 1,
              "machine": {"device": "d", "versions": {}}, "command": "c"}  # fmt: skip
    report.present(result, tmp_path / "o.json", profile=True)
    assert (tmp_path / "o.png").stat().st_size > 5000
    kept = json.loads((tmp_path / "o.profile.json").read_text())
    assert [k["peer"] for k in kept] == ["ours", "liger"]
    assert "1.88" in report.text(result) and "1.19" in report.text(result)


def test_dry_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every phase with tiny models: two peers timed, one refused, gradients against float32's."""
    out = tmp_path / "step.json"
    peers = "eager,ours:lowering=fx:verify=off"
    typed = ["W1", "C", "--tiny", "--cpu", "--peers", peers, "--seconds", "200", "--rounds", "2"]
    _module("bench_step").main([*typed, "--scratch", str(tmp_path / "scratch"), str(out)])
    rows = {(r["work"], r["peer"].split(":")[0]): r for r in json.loads(out.read_text())["rows"]}
    assert set(rows) == {(w, p) for w in ("W1", "C") for p in ("eager", "ours")}
    for peer in ("eager", "ours"):
        row = rows["W1", peer]
        assert len(row["all_ms"]) == 4 and row["ms"] > 0 and row["first_step_s"] > 0
        assert row["losses"][-1] < row["losses"][0]
    assert rows["W1", "ours"]["coverage"]["counts"]["rms_norm"] == 5
    assert rows["W1", "ours"]["loss_first"] == pytest.approx(
        rows["W1", "eager"]["loss_first"], 1e-3
    )
    eager, ours = (rows["C", peer]["error_mean"] for peer in ("eager", "ours"))
    assert 0 < ours < 1.1 * eager < 0.05
    assert "x eager" in capfd.readouterr().out and not list((tmp_path / "scratch").iterdir())
