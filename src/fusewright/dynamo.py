"""A backend for ``torch.compile``, for those who prefer it to ``fusewright.optimize``.

    model = torch.compile(model, backend="fusewright")

finds :func:`backend` through the ``torch_dynamo_backends`` entry point. What Dynamo captures is then
the whole model or what lies between its graph breaks, rather than one layer that all layers share:
compiling takes longer and the logits are always computed. Graphs without gradients run as captured.

    compiler = fusewright.dynamo.Backend(patterns=["rms_norm"])
    model = torch.compile(model, backend=compiler)
    print(compiler.report())                            # after the first training step
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import fx

    from fusewright.compiler.explain import CoverageReport


class Backend:
    """Rewrites and verifies each graph that Dynamo hands over, and keeps what the report says of it.

    Args:
        patterns: names of the patterns to use; all by default.
        lowering: "fx", "inductor", or "auto" (Inductor on a GPU).
        verify: "first_step" or "off", as for ``fusewright.optimize``.
        strict: raise where a graph cannot be compiled or verified, instead of running it as captured.

    Raises:
        ValueError: unknown option or pattern.
    """

    def __init__(
        self,
        patterns: Sequence[str] | None = None,
        lowering: str = "auto",
        verify: str = "first_step",
        strict: bool = False,
    ) -> None:
        from fusewright.compiler.config import Options
        from fusewright.compiler.session import Session
        from fusewright.patterns import DEFAULT
        from fusewright.runtime.op import register_all

        register_all()
        self._session = Session(
            Options.build(
                DEFAULT,
                patterns=patterns,
                lowering=lowering,
                verify=verify,
                logits="eager",
                strict=strict,
            )
        )
        self._graphs = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """The callable for one captured graph, as ``torch.compile`` asks for it."""
        if not torch.is_grad_enabled():
            forward: Callable[..., Any] = gm.forward
            return forward
        from fusewright.compiler.pipeline import compile_graph

        name = f"graph {self._graphs}"
        self._graphs += 1
        session = self._session
        run = compile_graph(gm, example_inputs, session, "leaf", name)

        def tracked(*args: Any) -> Any:
            session.entering(name)
            try:
                return run(*args)
            finally:
                session.leaving()

        return tracked

    def report(self) -> CoverageReport:
        """What was rewritten in the graphs that have run, what was not and why."""
        from fusewright.compiler import coverage

        return coverage.report(self._session)


def backend(
    gm: fx.GraphModule, example_inputs: list[Any], *, mode: Any = None, options: Any = None
) -> Callable[..., Any]:
    """What ``backend="fusewright"`` names; ``options`` are the arguments of :class:`Backend`.

    Raises:
        ValueError: a ``mode`` was given (this backend has none), or an option is unknown.
        TypeError: an option has no such name.
    """
    if mode not in (None, "default"):
        raise ValueError(f'backend="fusewright" has no modes; got mode={mode!r}')
    return Backend(**(options or {}))(gm, example_inputs)
