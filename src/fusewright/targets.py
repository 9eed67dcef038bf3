"""What the command line may be asked about: a model type, a config.json, or a folder with one.

The model is built on the meta device, so that no weight is ever allocated, unless another is named.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# The classes that take labels, the most common first; a config names one of them by its mapping.
_HEADS = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
)
_LONGEST = 4096
BASES = ("nf4", "fp4")
_BLOCK, _OUTER = 64, 256  # weights a scale, scales a scale of theirs: what bitsandbytes takes
# What model classes raise over a config whose values do not fit together.
_MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class BadTarget(Exception):
    """The target cannot be answered for; the message is one line for the user."""


class MissingExtra(BadTarget):
    """A package that is not installed is needed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'fusewright[{extra}]'")


@dataclass(frozen=True)
class Question:
    """What is asked about a model besides its name.

    Sequence 0 is what the config allows, to 4096; layers 0 is as many as the config has. On another
    device than meta the weights are drawn at random. ``base`` names a 4-bit form of the frozen linears,
    one of ``BASES``, on the meta device; "" leaves them in ``dtype``.
    """

    batch: int = 1
    sequence: int = 0
    dtype: str = "bfloat16"
    lora: int = 0
    trust_remote_code: bool = False
    device: str = "meta"
    layers: int = 0
    base: str = ""


@dataclass(frozen=True)
class Built:
    """A model on the question's device and the batch to observe it with."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    about: dict[str, Any]


def build(target: str, question: Question) -> Built:
    """The model of a target, in training mode, on the question's device.

    Raises:
        BadTarget: there is no such target, or it does not build; the message says which and why.
    """
    config = _config(target, question)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = int(getattr(text, "max_position_embeddings", 0) or _LONGEST)
    sequence = question.sequence or min(_LONGEST, longest)
    if question.layers:
        _shorten(text, question.layers)
    model = _model(target, config, question)
    if question.base:
        _pack(model, question)
    if question.lora:
        model = _with_adapters(model, question)
    vocabulary = int(getattr(text, "vocab_size", 0) or 2)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (question.batch, sequence))
    about = {"model": type(model).__name__, "target": target, "batch": question.batch}
    about |= {"sequence": sequence, "dtype": question.dtype}
    about |= {"lora": question.lora} if question.lora else {}
    return Built(model.train(), {"input_ids": ids, "labels": ids.to(question.device)}, about)


def _config(target: str, question: Question) -> Any:
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    path = Path(target).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise BadTarget(f"{target}: the folder has no config.json")
    if path.is_file():
        return _from_file(path, question)
    if target in CONFIG_MAPPING:
        return AutoConfig.for_model(target)
    if target.endswith(".json") or target.startswith((".", "/", "~")):
        raise BadTarget(f"{target}: no such file or folder")
    if "/" not in target:
        close = difflib.get_close_matches(target, list(CONFIG_MAPPING.keys()), 3, 0.6)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise BadTarget(f"unknown model type {target!r}, and no such file or folder{hint}")
    try:
        return AutoConfig.from_pretrained(target, trust_remote_code=question.trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadTarget(
            f"{target}: its config cannot be fetched (offline, gated, or no such repository): "
            f"{_brief(error)}; give a local config.json instead"
        ) from error


def _from_file(path: Path, question: Question) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadTarget(f"{path}: not readable as JSON: {_brief(error)}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise BadTarget(f"{path}: the config names no model_type")
    if kind not in CONFIG_MAPPING and not (values.get("auto_map") and question.trust_remote_code):
        own = " (it needs its own code: --trust-remote-code)" if values.get("auto_map") else ""
        raise BadTarget(f"{path}: unknown model type {kind!r}{own}")
    try:
        return AutoConfig.from_pretrained(
            str(path.parent if values.get("auto_map") else path),
            trust_remote_code=question.trust_remote_code,
        )
    except Exception as error:
        # A config class may raise whatever it likes over values that it does not expect.
        raise BadTarget(f"{path}: the config does not load: {_brief(error)}") from error


def _model(target: str, config: Any, question: Question) -> nn.Module:
    import transformers

    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the layers in their own dtype: what is counted is said
    dtype = getattr(torch, question.dtype)
    reasons = []
    for name in _HEADS:
        head = getattr(transformers, name, None)
        if head is None or not _takes(head, config, question):
            continue
        try:
            with torch.device(question.device):
                model: nn.Module = head.from_config(
                    config, dtype=dtype, trust_remote_code=question.trust_remote_code
                )
            return model
        except _MISFITS as error:
            reasons.append(_brief(error))
    if reasons:
        raise BadTarget(f"{target}: the config does not build a model: {reasons[0]}")
    raise BadTarget(f"{target}: {config.model_type!r} has no language model that takes labels")


def _takes(head: Any, config: Any, question: Question) -> bool:
    remote = question.trust_remote_code and getattr(config, "auto_map", None)
    return type(config) in head._model_mapping or bool(remote)


def _shorten(config: Any, layers: int) -> None:
    """Keep the first ``layers`` layers of a config, and of its lists of one entry a layer."""
    had = getattr(config, "num_hidden_layers", None)
    if had is None or layers > had:
        raise BadTarget(f"--layers {layers}: the config has {had or 'no number of'} layers")
    config.num_hidden_layers = layers
    for name, entries in vars(config).items():
        if isinstance(entries, list) and len(entries) == had:
            setattr(config, name, entries[:layers])


def _pack(model: nn.Module, question: Question) -> None:
    """Every linear layer but the head over 4-bit weights with double quantisation, as QLoRA has them."""
    if question.base not in BASES:
        raise BadTarget(f"base: expected one of {', '.join(BASES)}; got {question.base!r}")
    if question.device != "meta" or not question.lora:
        raise BadTarget("base: 4-bit weights are for adapters over them, and for shapes alone")
    try:
        import bitsandbytes
    except ImportError:
        raise MissingExtra("bitsandbytes", "qlora") from None
    for name in _linears(model):
        owner, _, last = name.rpartition(".")
        dense = model.get_submodule(name)
        setattr(
            model.get_submodule(owner),
            last,
            packed_linear(bitsandbytes, dense, question.base, getattr(torch, question.dtype)),
        )
    model.is_loaded_in_4bit = model.is_quantized = True  # type: ignore[assignment]


def packed_linear(library: Any, dense: Any, kind: str, dtype: torch.dtype) -> nn.Module:
    """The 4-bit layer in place of a dense one, on the meta device, as bitsandbytes would make it."""
    count = dense.weight.numel()
    blocks = -(-count // _BLOCK)

    def empty(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    state = library.functional.QuantState
    outer = state(
        absmax=empty((-(-blocks // _OUTER),), torch.float32), blocksize=_OUTER,
        code=empty((256,), torch.float32), dtype=torch.float32,
    )  # fmt: skip
    scales = state(
        absmax=empty((blocks,), torch.uint8), shape=dense.weight.shape, blocksize=_BLOCK,
        code=empty((16,), torch.float32), quant_type=kind, dtype=dtype,
        offset=empty((), torch.float32), state2=outer,
    )  # fmt: skip
    made = library.nn.Linear4bit(
        dense.in_features, dense.out_features, bias=False, compute_dtype=dtype, quant_type=kind,
        device="meta",
    )  # fmt: skip
    made.weight = library.nn.Params4bit(
        empty((-(-count // 2), 1), torch.uint8), quant_state=scales, quant_type=kind,
        bnb_quantized=True,
    )  # fmt: skip
    made.quant_state, made.bias = scales, dense.bias
    return made  # type: ignore[no-any-return]


def _with_adapters(model: nn.Module, question: Question) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtra("peft", "hf") from None
    rank, meta = question.lora, question.device == "meta"
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_linears(model))
    try:
        with torch.device(question.device):
            adapted: nn.Module = get_peft_model(model, settings, low_cpu_mem_usage=meta)
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        raise BadTarget(f"peft cannot adapt this model: {_brief(error)}") from error
    return adapted


def _linears(model: nn.Module) -> list[str] | str:
    """Every nn.Linear but the head: "all-linear" would wrap experts' stacked parameters too."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    return names or "all-linear"


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
