"""The partition in the form that Inductor's ``custom_partitioner_fn`` takes; imported where it compiles."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from fusewright.compiler.partition import Asked, digest, partition


class Partitioner(CustomPartitionerFn):
    """Splits as ``asked``. In the keys of torch's caches it counts by what it decides."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **given: Any) -> Any:
        return partition(self.asked, gm, joint_inputs, **given)

    def uuid(self) -> str:
        """What the outcome depends on beside the graph."""
        return f"fusewright {self.asked.level} {self.asked.parameters} {digest()}"

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.uuid(),)
