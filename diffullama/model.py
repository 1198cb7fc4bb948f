"""A Hugging Face causal language model run as a diffusion model: full attention, the head only where it is needed.

Nothing of transformers is replaced: the model stays the library's own, masks and ``is_causal=False`` go in as
arguments (``attention.py``). ``forward`` does everything that needs parameters, head and loss included, so that
wrappers which gather or reduce parameters (DDP, FSDP2, ZeRO) see every use. The *shift* of autoregressive models is
kept: hidden state i predicts token i + 1.

Dimensions: B batch, L sequence, D width, V rows of the embedding, P positions selected by ``where`` in row-major order.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.chunked_loss import chunked_nll, chunked_weighted_nll
from common.errors import ConfigError
from diffullama.attention import attention_arguments, open_sliding_window, set_attention
from diffullama.convert import load_strictly, to_reference_keys

SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # options of families that are refused


class DiffusionLM(nn.Module):
    """Predictions of masked tokens from visible ones, by an adapted causal language model.

    Args:
        lm: a transformers ``*ForCausalLM``, or a peft model around one.
        mask_id: id of the mask token; None: there is none, only ``causal=True`` makes sense.
        shift: position i is predicted by the hidden state before it, as in the autoregressive parent; position 0 then
            has no prediction and must be given.

    Attributes:
        lm: as given; its parameters are this module's only ones, under ``lm.``.
        mask_id, shift: as given.
        vocab_size: V, the mask's row included.

    A sliding window of the library's model is opened, unless there is no mask.

    Source: arXiv 2410.17891, section 3; specification 3.1.
    Raises: ConfigError for a mask id outside the vocabulary, or a model that this cannot run.
    """

    def __init__(self, lm: nn.Module, mask_id: int | None, shift: bool = True) -> None:
        super().__init__()
        self.lm = lm
        self.mask_id = None if mask_id is None else int(mask_id)
        self.shift = bool(shift)
        # now, because sharding plans leave an empty tensor in its place
        self.vocab_size = self.hf.get_input_embeddings().weight.shape[0]
        if self.mask_id is not None and not 0 <= self.mask_id < self.vocab_size:
            raise ConfigError(
                f"mask_token_id={mask_id} is outside the model's {self.vocab_size} embedding rows; choose an id below, "
                "or add_mask_token=true."
            )
        scaled = [name for name in SCALED_LOGITS if getattr(self.config, name, None) not in (None, 1.0)]
        if scaled:
            raise ConfigError(
                f"model_type={self.config.model_type} changes its logits after the head "
                f"({scaled[0]}={getattr(self.config, scaled[0])}), which is not supported; use a GPT-2, LLaMA, Qwen2, "
                "Qwen3 or Mistral model."
            )
        if self.mask_id is not None:
            open_sliding_window(self.hf)

    @classmethod
    def from_causal_lm(cls, model: nn.Module, mask_id: int | None, shift: bool = True) -> "DiffusionLM":
        """The diffusion model with the weights of ``model``, which it keeps (no copy)."""
        return cls(model, mask_id, shift)

    # ---------------------------------------------------------------- the parts of the library's model

    @property
    def hf(self) -> nn.Module:
        """The ``*ForCausalLM``, out of a peft model if there is one."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    @property
    def config(self):
        """The library's configuration."""
        return self.hf.config

    @property
    def max_length(self) -> int | None:
        """Longest sequence: a hard limit with learnt positions, what was trained on with rotary ones."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def has_learnt_positions(self) -> bool:
        """Whether ``max_length`` is a hard limit (GPT-2)."""
        return hasattr(self.hf.base_model, "wpe")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer layers, which sharding and activation checkpointing treat one by one."""
        backbone = getattr(self.hf.base_model, "decoder", self.hf.base_model)
        return list(backbone.h if hasattr(backbone, "h") else backbone.layers)

    def set_attention(self, implementation: str) -> None:
        """Switches the attention backend (``eager``, ``sdpa``, ``flash_attention_2``, ...) between steps."""
        set_attention(self.hf, implementation)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``(V, D)`` and bias of the head, also where peft trains a copy of it."""
        head = self.hf.get_output_embeddings()
        if hasattr(head, "modules_to_save"):
            head = head.modules_to_save[head.active_adapter] if not head.disable_adapters else head.original_module
        if hasattr(head, "token_adapter"):  # the mask's row of a tied matrix: trained as input, never a target
            return head.weight.detach(), getattr(head.original_module, "bias", None)
        if hasattr(head, "lora_A"):
            raise ConfigError("peft.target_modules holds the head, whose loss is fused; leave lm_head out of it.")
        return head.weight, getattr(head, "bias", None)

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor | None = None,
        where: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        allowed: Tensor | None = None,
        visible: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Four outputs, by what is asked for; losses and log-probabilities are float32, in nats.

        * ``forward(x)``: raw logits ``(B, L, V)`` of the library's model, not shifted.
        * ``forward(x, where=...)``: ``(P, V)`` log-probabilities *of the tokens at* the positions, mask column -inf.
        * ``forward(x, targets, where)``: ``(P,)`` NLL of the targets at the positions. With no position it is empty,
          and its sum is a zero that depends on the parameters.
        * ``forward(x, targets, where, weights)``: ``(sum, nll_P)`` with ``sum`` the NLLs times constant weights.

        Args:
            tokens_BL: int64 ids, the mask among them.
            targets_BL: int64 clean ids.
            where: bool ``(B, L)``, positions whose token is predicted; with shift never position 0.
            weights: float32 constants, ``(B,)`` per row or ``(B, L)`` per position.
            allowed: bool attention mask (``attention.annealed_allowed``); None: full attention.
            visible: bool ``(B, L)``, False at padding, which nothing attends to.
            causal: attends as the autoregressive parent does.

        Raises: ValueError for targets without positions, or a prediction asked of position 0 with shift.
        """
        if targets_BL is not None and where is None:
            raise ValueError("DiffusionLM.forward: targets need `where`, the positions at which their loss is taken.")
        hidden_BLD = self._trunk(tokens_BL, allowed, visible, causal)
        weight_VD, bias_V = self._head()
        if where is None:
            return nn.functional.linear(hidden_BLD, weight_VD, bias_V)
        rows_P = where.flatten().nonzero().squeeze(1)
        if self.shift and bool(where[:, 0].any()):
            raise ValueError("DiffusionLM.forward: with shift position 0 has no prediction; give it (a BOS token).")
        hidden_PD = hidden_BLD.flatten(0, 1).index_select(0, rows_P - 1 if self.shift else rows_P)
        if targets_BL is None:
            return self._log_probs(hidden_PD, weight_VD, bias_V)
        target_P = targets_BL.flatten().index_select(0, rows_P)
        if weights is None:
            return chunked_nll(hidden_PD, weight_VD, bias_V, target_P)
        if weights.dim() == 1:
            weights = weights[:, None].expand(where.shape)
        weight_P = weights.flatten().index_select(0, rows_P)
        return chunked_weighted_nll(hidden_PD, weight_VD, bias_V, target_P, weight_P)

    def _trunk(self, tokens_BL: Tensor, allowed: Tensor | None, visible: Tensor | None, causal: bool) -> Tensor:
        """Hidden states after the final norm, ``(B, L, D)``."""
        if self.has_learnt_positions and tokens_BL.shape[1] > self.max_length:
            raise ConfigError(
                f"length={tokens_BL.shape[1]} exceeds the model's {self.max_length} positions; use fewer tokens."
            )
        kind = tokens_BL.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.hf.dtype
        arguments = attention_arguments(self.config._attn_implementation, dtype, allowed, visible, causal)
        return self.hf.base_model(input_ids=tokens_BL, use_cache=False, **arguments).last_hidden_state

    def _log_probs(self, hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        logits_PV = nn.functional.linear(hidden_PD, weight_VD, bias_V)
        logits_PV = logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
        if self.mask_id is not None:
            logits_PV = logits_PV.index_fill(1, torch.tensor([self.mask_id], device=logits_PV.device), -torch.inf)
        return logits_PV.log_softmax(-1)

    def log_probs(self, hidden_PD: Tensor) -> Tensor:
        """Log-probabilities ``(P, V)`` of tokens from hidden states after the final norm, mask column -inf."""
        return self._log_probs(hidden_PD, *self._head())

    def denoise(self, tokens_RL: Tensor, where_RL: Tensor) -> Tensor:
        """The denoiser of ``common/diffusion/absorbing.py``: log-probabilities ``(P, V)`` at the positions."""
        return self(tokens_RL, where=where_RL)

    # ---------------------------------------------------------------- interchange

    def load_reference_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads wrapper keys of the released code, or the library's own; strict (``convert.to_hf_keys``)."""
        load_strictly(self.hf, state)

    def reference_state_dict(self) -> dict[str, Tensor]:
        """The weights under the wrapper keys of the released code; one copy of a tied matrix."""
        return {key: value.detach() for key, value in self.reference_parameters().items()}

    def reference_parameters(self) -> dict[str, Tensor]:
        """The parameters themselves under those keys, for gradients."""
        return to_reference_keys(self.hf)
