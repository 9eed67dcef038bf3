"""Build a workload's model as one peer trains it.

eager            transformers and peft as they are
layers           torch.compile of each decoder layer
layers+ligerflce the same with Liger's fused head and loss
compile          torch.compile of the whole model
liger            Liger's kernels
cce              cut-cross-entropy's fused head and loss, eager otherwise
unsloth          Unsloth's own loader
ours             fusewright.optimize(model, lowering="inductor"); options after colons, such as
                 ours:lowering=fx, ours:verify=off, ours:disable=rope+glu
Any of them with +amp: float32 adapters under bf16 autocast, which is peft's default.

All train the same weights, adapters and batch with the same fused AdamW.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from step_work import TARGETS, Work, base, options


class NotForThis(RuntimeError):
    """The peer does not do this workload; a line of the table says why."""


class Trainee:
    """A model of one peer with its optimizer and its one batch.

    Attributes:
        losses: the loss of every step so far, on the device.
    """

    def __init__(self, work: Work, peer: str, device: str, saved: Path, rank: int = 16) -> None:
        torch.manual_seed(0)
        self.work, self.peer, self.device = work, peer, device
        self.amp = "amp" in peer.split(":")[0].split("+")
        name = base(peer)
        if name == "unsloth":
            model = _unsloth(work, saved)
        else:
            _patch(name, work)
            model = _adapted(_plain(work, device, name == "fp32"), work, self.amp, rank)
        if work.mode != "full":
            _fill_adapters(model, random_b=work.name == "C")
        model.train()
        self.raw = model
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(10, work.shape["vocab_size"], work.batch, generator=generator)
        self.ids = ids.to(device)
        self.losses: list[torch.Tensor] = []
        self.model = _compiled(model, name, peer)

    def forward_backward(self) -> torch.Tensor:
        """Loss and gradients of the batch."""
        context: Any = contextlib.nullcontext()
        if self.amp:
            context = torch.autocast(self.device, dtype=torch.bfloat16)
        with context:
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """One optimizer step; does not wait for the device."""
        self.losses.append(self.forward_backward())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients of the trained parameters, in float32 on the CPU."""
        return {
            name.replace("_orig_mod.", ""): p.grad.float().cpu()
            for name, p in self.raw.named_parameters()
            if p.requires_grad and p.grad is not None
        }


def config_of(work: Work) -> Any:
    """The config of transformers for a workload's shape."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        work.family,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **work.shape,
    )
    return config


def _plain(work: Work, device: str, float32: bool) -> Any:
    """Random weights made on the device, from the same seeded draw whatever the dtype."""
    from transformers import AutoModelForCausalLM

    config = config_of(work)
    dtype = getattr(torch, work.dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                frequencies = getattr(child, "inv_freq", None)
                if frequencies is not None and frequencies.dtype != torch.float32:
                    setattr(parent, name, type(child)(config=config))  # as from_pretrained does
    generator = torch.Generator(device=device).manual_seed(1234)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(0.0, 0.02, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    model.tie_weights()
    return model.float() if float32 else model


def _adapted(model: Any, work: Work, amp: bool, rank: int) -> Any:
    if work.mode == "qlora":
        _quantise(model)
    if work.mode != "full":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(TARGETS),
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(model, lora, autocast_adapter_dtype=amp)
    if work.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _quantise(model: Any) -> None:
    """Every projection as bitsandbytes' NF4 with double quantisation, one layer at a time."""
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for parent in list(layer.modules()):
            for name, linear in list(parent.named_children()):
                if name not in TARGETS:
                    continue
                new = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, quant_type="nf4",
                    compute_dtype=torch.bfloat16, compress_statistics=True, device="meta",
                )  # fmt: skip
                new.weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad=False, compress_statistics=True,
                    quant_type="nf4", blocksize=64, quant_storage=torch.uint8, module=new,
                ).to(linear.weight.device)  # fmt: skip
                if not new.weight.bnb_quantized:
                    new.weight = new.weight._quantize(linear.weight.device)
                setattr(parent, name, new)
    model.is_loaded_in_4bit = model.is_quantized = True


def _fill_adapters(model: Any, random_b: bool) -> None:
    """A from N(0, 0.02); B zero, or as A. By sorted name: the same for every peer."""
    generator = torch.Generator().manual_seed(77)
    adapters = sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)
    with torch.no_grad():
        for name, p in adapters:
            std = 0.02 if random_b or "lora_A" in name else 0.0
            drawn = (torch.randn(p.shape, generator=generator) * std).to(torch.bfloat16)
            p.copy_(drawn.to(p.device, p.dtype))


def _patch(name: str, work: Work) -> None:
    """What a peer replaces in transformers before a model is made."""
    if name in ("liger", "layers+ligerflce"):
        if work.family != "llama":
            raise NotForThis(f"Liger does not patch {work.family}")
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        own = name == "liger"
        apply_liger_kernel_to_llama(
            rope=own, rms_norm=own, swiglu=own, cross_entropy=False, fused_linear_cross_entropy=True
        )
    if name == "cce":
        _patch_cut_cross_entropy(work)


def _patch_cut_cross_entropy(work: Work) -> None:
    """Its wheel has no patch for this transformers: the head's forward, in its documented call."""
    import transformers
    from cut_cross_entropy import linear_cross_entropy
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def forward(self: Any, input_ids: Any = None, labels: Any = None, **given: Any) -> Any:
        kept = {k: v for k, v in given.items() if k in ("attention_mask", "position_ids")}
        hidden = self.model(input_ids=input_ids, use_cache=False, **kept).last_hidden_state
        loss = linear_cross_entropy(hidden, self.lm_head.weight, labels, shift=True)
        return CausalLMOutputWithPast(loss=loss)

    head = type(config_of(work)).__name__.replace("Config", "ForCausalLM")
    getattr(transformers, head).forward = forward


def _compiled(model: Any, name: str, peer: str) -> Any:
    """The callable that trains: the model itself unless torch.compile wraps the whole of it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # A dry run shows that the benchmark works, not that Inductor does.
    backend = os.environ.get("STEP_BACKEND", "inductor")
    if name == "compile":
        if getattr(inner, "is_gradient_checkpointing", False) and inner is not model:
            inner.disable_input_require_grads()  # peft's hook would break the graph five times
        return torch.compile(model, dynamic=False, backend=backend)
    if name.startswith("layers"):
        for layer in inner.model.layers:
            layer.compile(dynamic=False, backend=backend)
    if name == "ours":
        import fusewright

        given = {"lowering": "inductor"} | options(peer)
        given.pop("disable", None)  # in the environment of the process
        return fusewright.optimize(model, **given)  # type: ignore[arg-type]
    return model


def _unsloth(work: Work, saved: Path) -> Any:
    """Unsloth's loader on the same weights, which another process has saved."""
    if work.family != "llama":
        raise NotForThis(f"Unsloth has no kernels for {work.family}")
    from unsloth import FastLanguageModel

    recompute: Any = "unsloth" if work.checkpoint else False
    model, _ = FastLanguageModel.from_pretrained(
        str(saved),
        max_seq_length=work.batch[1],
        dtype=torch.bfloat16,
        load_in_4bit=work.mode == "qlora",
        use_gradient_checkpointing=recompute,
        local_files_only=True,
        **({"full_finetuning": True} if work.mode == "full" else {}),
    )
    if work.mode == "full":
        return model
    return FastLanguageModel.get_peft_model(
        model, r=16, target_modules=list(TARGETS), lora_alpha=16, lora_dropout=0, bias="none",
        use_gradient_checkpointing=recompute, random_state=3407,
    )  # fmt: skip


def save(work: Work, device: str, folder: Path) -> None:
    """The workload's weights and a trivial tokenizer, for a peer that loads from files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    _plain(work, device, False).save_pretrained(folder, max_shard_size="5GB")
    words = ["<unk>", "<s>", "</s>", "<pad>"] + [f"w{i}" for i in range(4, 300)]
    model = models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", model_max_length=8192,
    ).save_pretrained(folder)  # fmt: skip
