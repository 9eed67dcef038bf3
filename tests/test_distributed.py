"""DDP, FSDP2 and accelerate over two gloo processes: every gradient as without Fusewright."""

from __future__ import annotations

import distributed_steps
import models
import ranks


def test_two_processes_train_as_in_eager() -> None:
    first, second = ranks.run(distributed_steps.every_case)
    (notes,) = first.pop("notes").values()
    layers = {n.split(" ")[1] for n in notes if "it lies in memory of FSDP's" in n}
    assert len(layers) == 4 * models.LAYERS, notes  # one for each input that linears share
    for case, told in first.items():
        assert told["loss"] != second[case]["loss"], "each process has data of its own"
        wanted = models.expected_counts("llama")
        if case[2]:
            wanted |= {"lora": 7 * models.LAYERS}
        got = {n: c for n, c in told["counts"].items() if n in wanted}
        assert got == wanted, (case, told)
        assert not told["eager_now"], (case, told)
