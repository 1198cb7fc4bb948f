"""The generator: a recurrent stack makes one prototype per token, a small denoiser draws the token around it.

The keys are those of the released checkpoints. Dimensions: B networks, L tokens, D values per token, M model width, P
width of a prototype, R rows (tokens of any networks), E numbers of a condition.
"""

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import ConfigError
from rpg.denoiser import ConvDenoiser
from rpg.model_config import REFERENCE_GATE, GeneratorConfig
from rpg.noise_schedule import TokenDiffusion, linear_tables
from rpg.positions import TokenPlaces, token_positions
from rpg.recurrence import GatedMLPStack, LSTMStack, MambaStack, Stack, TransformerStack

CONDITION_KERNEL = 9


class Generator(nn.Module):
    """RPG, with every stack, condition and head of its experiments.

    Args:
        positions_LM: the position table.
        gate_L: 1 where a token sees a gated condition; None: the last eight, as released.

    Source: RPG (Wang et al., 2025).
    """

    def __init__(self, config: GeneratorConfig, positions_LM: Tensor, gate_L: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        _check_positions(config, positions_LM)
        self.model = build_stack(config, positions_LM)
        if config.head == "diffusion":
            denoiser = ConvDenoiser(
                config.channels, config.dim_per_token, config.width, kernel_size=config.kernel_size, norm=config.norm
            )
            self.criteria = nn.Module()
            self.criteria.net = denoiser
            tables = linear_tables(*config.beta, config.diffusion_steps)
            self.diffusion = TokenDiffusion(tables, prediction=config.prediction, min_snr_gamma=config.min_snr_gamma)
        if config.num_states:
            self.to_permutation_state = nn.Embedding(config.num_states, config.d_model)
            nn.init.constant_(self.to_permutation_state.weight, 1.0 / config.d_model)
        self._build_condition(gate_L)

    def _build_condition(self, gate_L: Tensor | None) -> None:
        config = self.config
        if config.condition in ("none", "linear"):
            self.to_condition = nn.Linear(max(config.condition_size, 1), config.d_model)
            return
        norm = nn.SiLU() if config.condition == "gated" else nn.LayerNorm(config.d_condition)
        self.get_condition = nn.Sequential(nn.Linear(config.condition_size, config.d_condition), norm)
        self.to_condition_linear = nn.Linear(config.d_condition, config.d_model)
        if config.condition == "gated":
            if gate_L is None:
                gate_L = torch.zeros(config.num_tokens)
                gate_L[-REFERENCE_GATE:] = 1
            self.register_buffer("to_condition_gate", gate_L.float().reshape(1, -1, 1))
        else:
            tokens, padding = config.num_tokens, CONDITION_KERNEL // 2
            self.to_condition_conv = nn.Sequential(
                nn.Conv1d(1, tokens, CONDITION_KERNEL, padding=padding),
                nn.GroupNorm(1, tokens),
                nn.Conv1d(tokens, tokens, CONDITION_KERNEL, padding=padding),
            )

    @property
    def denoiser(self) -> ConvDenoiser:
        return self.criteria.net

    # ---------------------------------------------------------------- prototypes

    def embed_condition(self, condition_BE: Tensor | None, keep_B: Tensor | None = None) -> Tensor:
        """``(B, 1 or L, M)``: what the condition adds to the positions; without one, its bias or zeros, one row.

        Args:
            keep_B: False drops the condition of a row, for classifier-free guidance.

        Raises: ConfigError if the condition has another length than the model's.
        """
        config = self.config
        if condition_BE is not None and condition_BE.shape[-1] != max(config.condition_size, 1):
            raise ConfigError(
                f"condition of length {condition_BE.shape[-1]}: this generator takes "
                f"{config.condition_size} numbers{'' if config.condition_size else ', that is, none'}."
            )
        device = self.model.pe.device
        if config.condition in ("none", "linear"):
            if condition_BE is None:
                condition_BE = torch.zeros(1, max(config.condition_size, 1), device=device)
            elif keep_B is not None:
                condition_BE = condition_BE * keep_B[:, None]
            return self.to_condition(condition_BE)[:, None]
        if condition_BE is None:
            return torch.zeros(1, 1, config.d_model, device=device)
        embedded_B1M = self.to_condition_linear(self.get_condition(condition_BE))[:, None]
        if config.condition == "gated":
            embedded = embedded_B1M * self.to_condition_gate
        else:
            embedded = self.to_condition_conv(embedded_B1M)
        return embedded if keep_B is None else embedded * keep_B[:, None, None]

    def prototypes(
        self, state_B: Tensor | None = None, condition_BE: Tensor | None = None, keep_B: Tensor | None = None
    ) -> Tensor:
        """``(B, L, P)``; one row if neither a state nor a condition is given."""
        embedded = self.embed_condition(condition_BE, keep_B)
        if state_B is not None:
            if not self.config.num_states:
                raise ConfigError("this generator has no permutation states; leave the state out.")
            embedded = embedded + self.to_permutation_state(state_B)[:, None]
        return self.model(embedded)

    # ---------------------------------------------------------------- training

    def forward(
        self,
        x0_RD: Tensor,
        source_R: Tensor,
        token_R: Tensor,
        *,
        state_B: Tensor | None = None,
        condition_BE: Tensor | None = None,
        keep_B: Tensor | None = None,
        t_R: Tensor | None = None,
        eps_RD: Tensor | None = None,
        rows_per_pass: int | None = None,
    ) -> Tensor:
        """Sum of squared errors over the values of R tokens; padding (NaN) does not count.

        Args:
            source_R: which row of ``state_B`` and ``condition_BE`` a token belongs to.
            token_R: its place 0..L-1 in the network.
            t_R, eps_RD: time and noise of each token; not used by ``head=mse``.
            rows_per_pass: at most so many rows go through the denoiser together; None: all.
        """
        prototypes_BLP = self.prototypes(state_B, condition_BE, keep_B)
        if len(prototypes_BLP) == 1:
            source_R = torch.zeros_like(source_R)
        prototypes_RP = prototypes_BLP[source_R, token_R]
        if self.config.head == "mse":
            return _squared_error(prototypes_RP, torch.nan_to_num(x0_RD), x0_RD, None)
        total = prototypes_RP.new_zeros((), dtype=torch.float32)
        size = rows_per_pass or len(x0_RD)
        for first in range(0, len(x0_RD), size):
            rows = slice(first, first + size)
            total = total + self.rows_loss(x0_RD[rows], prototypes_RP[rows], t_R[rows], eps_RD[rows])
        return total

    def rows_loss(self, x0_RD: Tensor, prototypes_RP: Tensor, t_R: Tensor, eps_RD: Tensor) -> Tensor:
        """Summed squared error of the denoiser over the values that are not padding."""
        x_t_RD = self.diffusion.noise(x0_RD, t_R, eps_RD)
        output_RD = self.denoiser(x_t_RD, t_R, prototypes_RP)
        return _squared_error(output_RD, self.diffusion.target(x0_RD, t_R, eps_RD), x0_RD, self.diffusion.weight(t_R))

    def blocks(self) -> list[nn.Module]:
        """Layers that are sharded and recomputed one by one."""
        return [*self.model.blocks, *(self.denoiser.levels if self.config.head == "diffusion" else [])]


def _squared_error(output_RD: Tensor, target_RD: Tensor, x0_RD: Tensor, weight_R: Tensor | None) -> Tensor:
    # where, not a product: what stands under padding may be anything, NaN too
    difference_RD = torch.where(torch.isnan(x0_RD), 0.0, output_RD.float() - target_RD)
    square_RD = difference_RD.square()
    return (square_RD if weight_R is None else square_RD * weight_R[:, None]).sum()


def build_stack(config: GeneratorConfig, positions_LM: Tensor) -> Stack:
    """The recurrent stack of ``config``."""
    layers, trainable = config.num_layers, config.trainable_positions
    if config.stack == "mamba":
        return MambaStack(
            positions_LM, layers, post_d_model=config.post_d_model, trainable=trainable, d_state=config.d_state,
            d_conv=config.d_conv, expand=config.expand, headdim=config.headdim, ngroups=config.ngroups,
            chunk_size=config.chunk_size,
        )  # fmt: skip
    if config.stack == "lstm":
        return LSTMStack(positions_LM, layers, dropout=config.dropout, trainable=trainable)
    if config.stack == "gmlp":
        return GatedMLPStack(positions_LM, layers, expand=config.expand, trainable=trainable)
    return TransformerStack(
        positions_LM, layers, num_heads=config.num_heads, head_size=config.head_size,
        feedforward=config.feedforward, attention=config.attention, trainable=trainable,
    )  # fmt: skip


def build_generator(config: GeneratorConfig, codec: TokenPlaces, names: Sequence[str] = ()) -> Generator:
    """A generator for the tokens of ``codec``.

    Args:
        names: of the tensors that ``codec.token_tensor_L`` counts, for ``config.gate``.

    Raises: ConfigError if no tensor has a name that ``config.gate`` matches.
    """
    gate_L = None
    if config.condition == "gated" and config.gate:
        gate_L = name_gate(config.gate, names, codec.token_tensor_L)
    return Generator(config, token_positions(codec, config.positions, config.d_model), gate_L)


def name_gate(patterns: Sequence[str], names: Sequence[str], token_tensor_L: Tensor) -> Tensor:
    """1 at the tokens of tensors whose name matches one of the shell patterns.

    Raises: ConfigError for a pattern that matches nothing.
    """
    open_tensors = set()
    for pattern in patterns:
        found = [index for index, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise ConfigError(
                f"model.gate={pattern!r} matches none of the {len(names)} tensors, of which the last are "
                f"{', '.join(names[-3:])}; use shell patterns such as 'head.*'."
            )
        open_tensors.update(found)
    return torch.tensor([float(int(index) in open_tensors) for index in token_tensor_L])


def _check_positions(config: GeneratorConfig, positions_LM: Tensor) -> None:
    if tuple(positions_LM.shape) != (config.num_tokens, config.d_model):
        raise ConfigError(
            f"the position table has shape {tuple(positions_LM.shape)}, but model.num_tokens={config.num_tokens} and "
            f"model.d_model={config.d_model}; build it by token_positions."
        )
