"""Options of ``python -m diffullama.generate``, checked before anything is loaded."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from common.config import PRECISIONS as MODEL_PRECISIONS
from common.config import require_at_least, require_choice
from common.diffusion.categorical import TokenDraw
from common.errors import ConfigError
from diffullama.filters import require_top_p
from diffullama.reference_samplers import ORDERS as REFERENCE_ORDERS
from diffullama.requests import TEMPLATES, Prompt, read_prompts
from diffullama.sampler import SamplerOptions

ENGINES = ("event", "reference")
DRAWS = ("sample", "greedy")
COST_ONLY = {
    "animation",
    "animation_rows",
    "batch_size",
    "device",
    "num_samples",
    "output",
    "overwrite",
    "progress",
    "resume",
    "show",
}
"""Options that do not decide a row's tokens."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of ``python -m diffullama.generate``; names of the released scripts where those have one."""

    model_path: str  # run folder, exported or Hugging Face folder, hub name, released checkpoint, adapter folder
    ema: bool = True  # averaged weights, where a run kept them
    tokenizer: str | None = None  # folder or hub name; null: the one stored with the model
    base: str | None = None  # adapter folders: the model below the adapter; null: the one it names
    mask_token_id: int | None = None  # null: the one stored with the model, or its family's
    shift: bool | None = None  # null: as stored with the model
    attn_implementation: str | None = None  # sdpa, eager, flash_attention_2; null: transformers' choice
    device: str | None = None  # null: this process's GPU, else the CPU
    model_precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the network; below fp32 the batch can matter

    prompt: str | list[int] = ""  # text or ids at the beginning
    suffix: str | list[int] = ""  # text or ids at the end: infilling
    fixed: Any = None  # {position: text or id or ids} counted without the begin-of-text token, as JSON or a mapping
    prompts: str | None = None  # .txt (a prompt per line) or .jsonl (prompt, suffix, label) in place of the above
    template: Literal["plain", "sft"] = "plain"  # sft: begin, prompt, separator, as in fine-tuning
    bos: bool | None = None  # begin-of-text token at position 0; null: where the model needs one (shift)
    length: int | None = None  # tokens per text, given ones included; null: the model's
    max_new_tokens: int | None = None  # free tokens per text, in place of length

    num_samples: int = 1  # texts per prompt
    batch_size: int = 8  # rows in flight per process
    seed: int = 0

    order: str = "random"  # random|first_hitting|confidence|entropy|margin|left_to_right
    diffusion_steps: int | None = 64  # calls per text (or block); random: steps of the time grid
    commit: str = "auto"  # fixed|binomial: how many positions a step fills; auto: binomial for random
    per_call: int | None = None  # positions per call, in place of diffusion_steps
    threshold: float | None = None  # all positions whose token has more than this probability
    entropy_bound: float | None = None  # nats by which positions filled together may depend on each other
    selection_noise: float = 0.0  # scale of Gumbel noise on the scores of the order
    block_length: int | None = None  # fill blocks of so many tokens from left to right
    cache: Literal["none", "prefix"] = "none"  # prefix: approximate unless the model was adapted block-causally
    guidance: float = 0.0  # classifier-free guidance on the given tokens: two evaluations per call
    engine: Literal["event", "reference"] = "event"  # reference: the released samplers, step by step

    draw: Literal["sample", "greedy"] = "sample"
    logits_temp: float = 0.95  # temperature; 0: greedy
    topp_temp: float | None = 0.9  # nucleus: p; null or 1: none
    top_k: int | None = None  # likeliest tokens to draw from; needs topp_temp=null
    forbid: list[int] | None = None  # ids that are never written; the mask never is
    stop: bool | list[int] = False  # end texts at the end-of-text or padding token, or at these ids

    output: str | None = None  # .jsonl file; null: texts on stdout only
    overwrite: bool = False  # replace an existing output
    resume: bool = False  # keep the rows that an existing output has
    show: bool = False  # watch a text being denoised in the terminal
    animation: str | None = None  # .html file on which texts are denoised step by step
    animation_rows: int = 8  # texts on that page
    progress: bool = True  # progress bar of the main process, on stderr

    def __post_init__(self) -> None:
        if not self.model_path:
            raise ConfigError("model_path is empty; give a run folder, a model folder or a hub name.")
        require_choice("model_precision", self.model_precision, MODEL_PRECISIONS)
        require_choice("template", self.template, TEMPLATES)
        require_choice("engine", self.engine, ENGINES)
        require_choice("draw", self.draw, DRAWS)
        for name in ("num_samples", "batch_size", "animation_rows"):
            require_at_least(name, getattr(self, name), 1)
        if self.diffusion_steps is not None:
            require_at_least("diffusion_steps", self.diffusion_steps, 1)
        require_at_least("logits_temp", self.logits_temp, 0)
        if self.model_precision == "fp32" and "flash" in (self.attn_implementation or ""):
            raise ConfigError(
                f"attn_implementation={self.attn_implementation} takes half precision only; set model_precision=bf16."
            )
        if self.length is not None:
            require_at_least("length", self.length, 1)
        if self.max_new_tokens is not None:
            require_at_least("max_new_tokens", self.max_new_tokens, 0)
            if self.length is not None:
                raise ConfigError("length and max_new_tokens exclude each other; set one of them.")
        if self.prompts is not None and (self.prompt or self.suffix or self.fixed):
            raise ConfigError("prompts (a file) excludes prompt, suffix and fixed; put them into the file.")
        if self.overwrite and self.resume:
            raise ConfigError("overwrite=true and resume=true contradict each other; set one of them.")
        if self.engine == "reference":
            self._check_reference()
        self.sampler_options()

    def _check_reference(self) -> None:
        """Raises ConfigError for options that the released samplers do not have."""
        if self.order not in REFERENCE_ORDERS:
            raise ConfigError(
                f"order={self.order} has no released sampler; choose {' or '.join(REFERENCE_ORDERS)}, or engine=event."
            )
        defaults = {"commit": "auto", "per_call": None, "threshold": None, "entropy_bound": None, "block_length": None}
        defaults |= {"cache": "none", "guidance": 0.0, "stop": False, "show": False, "animation": None}
        for name, value in defaults.items():
            if getattr(self, name) != value:
                raise ConfigError(f"{name}={getattr(self, name)} needs engine=event; the released samplers lack it.")
        if self.diffusion_steps is None:
            raise ConfigError("diffusion_steps=null needs engine=event; the released samplers make so many steps.")

    def token_draw(self) -> TokenDraw:
        """How tokens are drawn."""
        temperature = {"temperature": float(self.logits_temp)}
        if self.draw == "greedy":
            return TokenDraw(strategy="greedy")
        if self.topp_temp is not None:
            require_top_p(self.topp_temp, "topp_temp")
        nucleus = self.topp_temp is not None and self.topp_temp < 1
        if self.top_k is not None:
            if nucleus:
                raise ConfigError(f"top_k={self.top_k} and topp_temp={self.topp_temp}: set one; topp_temp=null for k.")
            return TokenDraw(strategy="top_k", para=self.top_k, **temperature)
        if nucleus:
            return TokenDraw(strategy="top_p", para=self.topp_temp, **temperature)
        return TokenDraw(**temperature)

    def sampler_options(self) -> SamplerOptions:
        """The sampler's options; ids that depend on the model are added later (``for_model``)."""
        limits = {"per_call": self.per_call, "threshold": self.threshold, "entropy_bound": self.entropy_bound}
        has_limit = any(limit is not None for limit in limits.values())
        return SamplerOptions(
            order=self.order,
            steps=None if has_limit or self.order == "first_hitting" else self.diffusion_steps,
            commit=self.commit,
            **limits,
            noise=self.selection_noise,
            block_length=self.block_length,
            cache=self.cache,
            guidance=self.guidance,
            forbid=tuple(self.forbid or ()),
            draw=self.token_draw(),
        )

    def read_prompts(self) -> list[Prompt]:
        """What is given of each text."""
        if self.prompts is not None:
            return read_prompts(self.prompts)
        return [Prompt(self.prompt, self.suffix, self.fixed)]

    def settings(self, prompts: Sequence[Prompt]) -> str:
        """Digest of everything that decides the tokens of a row."""
        decisive = {name: value for name, value in asdict(self).items() if name not in COST_ONLY}
        text = json.dumps([decisive, [asdict(prompt) for prompt in prompts]], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
