"""Linear layers of one input over 4-bit weights, with low-rank adapters (QLoRA).

The mathematics, the shapes and the layout of the arguments are those of ``lora``; each weight W_j is
given by the tensors of its 4-bit form and constants (see ``nf4``), dequantised to x's dtype:

    packed_j, absmax_j, offset_j, nested_absmax_j, nested_code_j      the last three None unless nested
    heights N_j, kinds "nf4" or "fp4", blocksizes, nested_blocksizes  the width K is x's

Nothing dequantised is saved. Each direction writes the weights into a scratch buffer with room for
the adapters (``room.scratch``) and runs the augmented GEMM of ``lora_gemm`` on it; the buffer comes
from the caching allocator and goes back at once, so that all layers share it. The forward needs room
behind the rows only and the backward below them. Without a gradient of x nothing is dequantised in
the backward. Layers without any adapter are one plain product in each direction. W_j has no gradient.

Where it rounds: W_j once to x's dtype, bit for bit as bitsandbytes does it; the rest as in ``lora``.
Traffic beside the GEMMs: half a byte read and one element written per weight, in each direction.
Source: T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fusewright.kernels import lora, lora_gemm, lora_scratch, nf4, room
from fusewright.kernels.codes import code
from fusewright.kernels.launch import HAS_TRITON
from fusewright.kernels.lora_group import (
    Group,
    Needs,
    Results,
    backward_flops,
    forward_flops,
    plan,
    takes,
)
from fusewright.kernels.reduce import absent
from fusewright.kernels.spec import OpSpec

Into = Callable[[torch.Tensor, nf4.Quantised, int], None]


class Weights(NamedTuple):
    """The 4-bit weights of a group, one entry per layer, as in the operator's arguments."""

    packed: Sequence[torch.Tensor]
    absmax: Sequence[torch.Tensor]
    offset: Sequence[torch.Tensor | None]
    nested_absmax: Sequence[torch.Tensor | None]
    nested_code: Sequence[torch.Tensor | None]
    heights: Sequence[int]
    kinds: Sequence[str]
    blocksizes: Sequence[int]
    nested_blocksizes: Sequence[int]

    def layer(self, j: int) -> nf4.Quantised:
        """The tensors and block sizes of one weight."""
        packed = self.packed[j]
        return nf4.Quantised(
            packed.reshape(-1).view(torch.uint8),
            self.absmax[j],
            code(self.kinds[j], packed.device),
            self.offset[j],
            self.nested_absmax[j],
            self.nested_code[j],
            self.blocksizes[j],
            self.nested_blocksizes[j],
        )

    def shapes_only(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of the weights' shapes that take no memory and whose values nobody may read."""
        return [x.new_empty(()).expand(n, x.shape[-1]) for n in self.heights]


class Given(NamedTuple):
    """The forward's arguments; ``group`` has ``shapes_only`` for weights."""

    group: Group
    widths: Sequence[int]
    out_dtype: torch.dtype
    roomy: bool
    grad_roomy: bool
    weights: Weights

    @classmethod
    def of(cls, *args: Any) -> Given:
        """From the operator's arguments."""
        weights = Weights(args[2], *args[13:])
        _check_lists(weights)
        group = Group(*args[:9])._replace(weights=weights.shapes_only(args[0]))
        widths, out_dtype, roomy, grad_roomy = args[9:13]
        return cls(group, widths, out_dtype, roomy, grad_roomy, weights)


def _check_lists(weights: Weights) -> None:
    if len({len(entries) for entries in weights}) != 1:
        raise ValueError(
            "packed, absmax, offset, nested_absmax, nested_code, heights, kinds, blocksizes, "
            "nested_blocksizes: expected one entry per layer"
        )


@contextmanager
def _dequantised(
    group: Group, weights: Weights, space: room.Room, into: Into, filled: bool
) -> Iterator[Group]:
    """The group with its weights in a scratch buffer.

    The room, behind the rows or below them, is zeros where the adapters will not have ``filled`` it.
    """
    x = group.x
    written = filled or not space.rows
    behind = 0 if filled else space.columns
    with room.scratch(weights.heights, x.shape[-1], space, x, written) as views:
        for j, view in enumerate(views):
            _write(view, weights.layer(j), into, behind if written else 0)
        yield group._replace(weights=views)


def _whole(dense: Group) -> torch.Tensor:
    """The weights below each other, (sum N_j, K), as they lie in their scratch buffer."""
    found = room.find(dense.weights, 0, 0)
    assert found is not None  # it was made for them
    return found.buffer[: found.height, : found.width]


def _bare(dense: Group) -> torch.Tensor:
    """y (..., sum N_j) of layers without adapters, by one product."""
    whole = _whole(dense)
    if all(b is None for b in dense.biases):
        return F.linear(dense.x, whole)
    pieces = [
        w.new_zeros(w.shape[0]) if b is None else b
        for w, b in zip(dense.weights, dense.biases, strict=True)
    ]
    return F.linear(dense.x, whole, torch.cat(pieces))


def _write(out: torch.Tensor, q: nf4.Quantised, into: Into, behind: int = 0) -> None:
    """Dequantise into ``out``; in float64 the product of value and scale is exact."""
    if out.dtype is torch.float64:
        nf4.check(q, *out.shape)
        nibbles = torch.stack((q.packed >> 4, q.packed & 15), -1).reshape(-1)[: out.numel()]
        scale = nf4.scales(q).repeat_interleave(q.blocksize)[: out.numel()]
        out.copy_((q.code.double()[nibbles.long()] * scale.double()).reshape(out.shape))
        nf4.clear_behind(out, behind)
    else:
        into(out, q, behind)


def _fwd(into: Into, *args: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    given = Given.of(*args)
    group = given.group
    lora.check(group)
    how = plan(group)
    augmented = room.serves(group.x.device, group.x.dtype) and takes(group, given.out_dtype)
    space = room.needed(how.columns if augmented else 0, 0)
    alone = len(given.weights.heights) == 1 and how.thin == how.columns == space.columns
    with _dequantised(group, given.weights, space, into, alone) as dense:
        if not group.down and takes(group, given.out_dtype):
            return room.columns_of(_bare(dense), given.widths), absent(group.x)
        if not augmented:
            rest = (given.widths, given.out_dtype, False, False)
            return lora.reference_fwd(*dense, *rest)
        whole, thin = lora_gemm.forward(dense, given.roomy)
    return room.columns_of(whole, given.widths), thin


def _bwd(into: Into, dys: Sequence[torch.Tensor], thin: torch.Tensor, *args: Any) -> Any:
    wanted = args[18:]
    given = Given.of(*args[:9], (), dys[0].dtype, False, *args[9:18])
    group = given.group
    need_x, need_inputs, need_biases, need_down, need_up = wanted
    needs = Needs(need_x, need_inputs, False, need_biases, need_down, need_up)
    augmented = room.serves(group.x.device, group.x.dtype) and takes(group, given.out_dtype)

    def run(dense: Group) -> Results:
        if needs.x and not group.down and takes(group, given.out_dtype):
            whole = dys[0] if len(dys) == 1 else torch.cat(list(dys), -1)
            dx = torch.matmul(whole, _whole(dense))
            rest = lora.reference_bwd(dys, thin, *group, False, *needs._replace(x=False))
            return Results(dx, *rest[1:])
        if augmented:
            return lora_gemm.backward(dys, thin, dense, given.grad_roomy, needs)
        return lora.reference_bwd(dys, thin, *dense, False, *needs)

    if needs.x:
        thin_rows = plan(group).thin if augmented else 0
        space = room.needed(0, thin_rows)
        whole = thin_rows == space.rows and all(source < 0 for source in group.source)
        with _dequantised(group, given.weights, space, into, whole) as dense:
            found = run(dense)
    else:
        found = run(group)  # reads the weights' shapes alone
    return found.x, found.inputs, found.biases, found.down, found.up


def reference_fwd(*args: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The pieces of y, and the thin products, with the weights dequantised in plain PyTorch."""
    return _fwd(nf4.reference_into, *args)


def reference_bwd(*args: Any) -> Any:
    """dx, dinputs, dbiases, ddown, dup, with the weights dequantised in plain PyTorch."""
    return _bwd(nf4.reference_into, *args)


def triton_fwd(*args: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The pieces of y, and the thin products, with the weights dequantised by a kernel."""
    return _fwd(nf4.triton_into, *args)


def triton_bwd(*args: Any) -> Any:
    """dx, dinputs, dbiases, ddown, dup, with the weights dequantised by a kernel."""
    return _bwd(nf4.triton_into, *args)


def _fake_fwd(*args: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    group = Given.of(*args).group
    return lora._fake_fwd(*group, *args[9:13])


def _fake_bwd(dys: Sequence[torch.Tensor], thin: torch.Tensor, *args: Any) -> Any:
    wanted = args[18:]
    group = Given.of(*args[:9], (), thin.dtype, False, *args[9:18]).group
    found = lora._fake_bwd(dys, thin, *group, False, *wanted[:2], False, *wanted[2:])
    return found.x, found.inputs, found.biases, found.down, found.up


def _forward_passing(args: Sequence[Any], out: Any) -> Any:
    given = Given.of(*args)
    return lora_scratch.forward(given.group, given.roomy, packed=True)


def _backward_passing(args: Sequence[Any], out: Any) -> Any:
    dys, _, *rest = args
    given = Given.of(*rest[:9], (), dys[0].dtype, False, *rest[9:18])
    return lora_scratch.backward(dys, given.group, given.grad_roomy, True, rest[18])


def _weight(into: Into, *args: Any) -> torch.Tensor:
    packed, absmax, offset, nested_absmax, nested_code, rows, columns, *rest, dtype = args
    kind, blocksize, nested_blocksize = rest
    if dtype is torch.float64:  # asked for where a whole graph is run in float64, scales included
        absmax, offset, nested_absmax, nested_code = (
            t.float() if t is not None and t.is_floating_point() else t
            for t in (absmax, offset, nested_absmax, nested_code)
        )
    weights = Weights([packed], [absmax], [offset], [nested_absmax], [nested_code], [rows],
                      [kind], [blocksize], [nested_blocksize])  # fmt: skip
    out: torch.Tensor = packed.new_empty((rows, columns), dtype=dtype)
    _write(out, weights.layer(0), into)
    return out


def weight_reference(*args: Any) -> torch.Tensor:
    """One weight (rows, columns) in plain PyTorch."""
    return _weight(nf4.reference_into, *args)


def weight_triton(*args: Any) -> torch.Tensor:
    """One weight (rows, columns) by a kernel."""
    return _weight(nf4.triton_into, *args)


def _fake_weight(packed: torch.Tensor, *args: Any) -> torch.Tensor:
    out: torch.Tensor = packed.new_empty((args[4], args[5]), dtype=args[-1])
    return out


_GROUP = (
    "Tensor x, Tensor[] inputs, Tensor[] packed, Tensor?[] biases, Tensor[] down, Tensor[] up, "
    "int[] member, int[] source, float[] scales"
)
_WEIGHTS = (
    "Tensor[] absmax, Tensor?[] offset, Tensor?[] nested_absmax, Tensor?[] nested_code, "
    "int[] heights, str[] kinds, int[] blocksizes, int[] nested_blocksizes"
)


def _save(inputs: dict[str, Any], outputs: tuple[Any, ...]) -> Sequence[Any]:
    values = list(inputs.values())
    return (outputs[-1], *values[:9], inputs["grad_roomy"], *values[13:21])


def _nothing(*_: Any) -> Sequence[Any]:
    return ()


OPS = (
    OpSpec(
        forward=f"lora_group_4bit({_GROUP}, int[] widths, ScalarType out_dtype, bool roomy, "
        f"bool grad_roomy, {_WEIGHTS}) -> (Tensor[] ys, Tensor thin)",
        backward=f"lora_group_4bit_backward(Tensor[] dys, Tensor thin, {_GROUP}, bool grad_roomy, "
        f"{_WEIGHTS}, bool need_x, bool need_inputs, bool need_biases, bool need_down, "
        "bool need_up) -> (Tensor dx, Tensor[] dinputs, Tensor[] dbiases, Tensor[] ddown, "
        "Tensor[] dup)",
        differentiable=("x", "inputs", "biases", "down", "up"),
        outputs=1,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        triton=(triton_fwd, triton_bwd) if HAS_TRITON else None,
        fake=(_fake_fwd, _fake_bwd),
        flops=(forward_flops, backward_flops),
        passing=(_forward_passing, _backward_passing),
    ),
    OpSpec(
        forward="weight_4bit(Tensor packed, Tensor absmax, Tensor? offset, Tensor? nested_absmax, "
        "Tensor? nested_code, int rows, int columns, str kind, int blocksize, "
        "int nested_blocksize, ScalarType dtype) -> Tensor weight",
        backward="",
        differentiable=(),
        outputs=1,
        save=_nothing,
        reference=(weight_reference, _nothing),
        triton=(weight_triton, _nothing) if HAS_TRITON else None,
        fake=(_fake_weight, _nothing),
    ),
)
