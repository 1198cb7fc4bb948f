"""What a training step of the generator computes: prototypes of the batch's sources, and noised tokens around them.

A batch holds ``network`` (B,): numbers of networks. Which of their tokens are used, at which times and with which
noise, is drawn per network of the global batch, so neither accumulation nor the number of processes changes a step.

Dimensions: B networks of a micro-batch, G of the global batch, k tokens drawn per network, R = B k rows, L tokens of a
network, D values, S distinct sources.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from common.seeding import generator
from common.task import Batch, Draws, StepOutput, Task
from rpg.denoiser import row_flops
from rpg.model import Generator
from rpg.model_config import GeneratorConfig
from rpg.sources import Sources

SEED_RANGE = 1 << 62


class Tokens(Protocol):
    """Tokens of all networks."""

    def gather(self, network_R: Tensor, token_R: Tensor) -> Tensor:
        """``(R, D)`` float32 on the CPU, padding NaN."""


class GeneratorTask(Task):
    """Training of a generator.

    Args:
        config: the network; ``build`` makes it.
        tokens: of all networks; None for estimates.
        sources: which networks share a prototype.
        valid_L: values (not padding) of each token.
        tokens_per_network: k.
        shared: one run of the stack per distinct source, whose tokens come from any of its networks; False: one per
            network of the batch, as released.
        drop_condition: share of networks that lose their condition.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        *,
        build: Callable[[], Generator],
        tokens: Tokens | None,
        sources: Sources,
        valid_L: Tensor,
        seed: int,
        tokens_per_network: int,
        shared: bool = True,
        drop_condition: float = 0.0,
        rows_per_pass: int | None = None,
    ) -> None:
        self.config, self.build, self.tokens, self.sources = config, build, tokens, sources
        self.valid_L, self.seed, self.tokens_per_network = valid_L, seed, tokens_per_network
        self.shared, self.drop_condition, self.rows_per_pass = shared, drop_condition, rows_per_pass

    def build_model(self) -> nn.Module:
        return self.build()

    # ---------------------------------------------------------------- random numbers

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        def rng(name: str) -> torch.Generator:
            return generator(self.seed, f"generator {name}", step)

        places, shape = rng("token"), (size, self.tokens_per_network)
        return {
            "token": torch.stack([self._token_places(places) for _ in range(size)]),
            "member": torch.rand(shape, generator=rng("member"), dtype=torch.float64),
            "t": torch.randint(self.config.diffusion_steps, shape, generator=rng("time")),
            "noise": torch.randint(SEED_RANGE, (size,), generator=rng("noise")),
            "keep": torch.rand(size, generator=rng("condition")) >= self.drop_condition,
        }

    def _token_places(self, rng: torch.Generator) -> Tensor:
        """k places of L, each as often as any other, up to one."""
        rounds = math.ceil(self.tokens_per_network / self.config.num_tokens)
        drawn = [torch.randperm(self.config.num_tokens, generator=rng) for _ in range(rounds)]
        return torch.cat(drawn)[: self.tokens_per_network]

    # ---------------------------------------------------------------- steps

    def count(self, batch: Batch, draws: Draws) -> float:
        """Values of the drawn tokens that are not padding."""
        return float(self.valid_L[draws["token"].cpu()].sum())

    def training_step(self, model: nn.Module, batch: Batch, draws: Draws) -> StepOutput:
        device = draws["t"].device
        network_B, token_Bk = batch["network"].cpu(), draws["token"].cpu()
        source_B = self.sources.source_K[network_B]
        source_Bk = source_B[:, None].expand_as(token_Bk)
        if self.shared:
            network_Bk = self.sources.members(source_Bk, draws["member"].cpu())
        else:
            network_Bk = network_B[:, None].expand_as(token_Bk)
        x0_RD = self.tokens.gather(network_Bk.flatten(), token_Bk.flatten())
        keep_B = draws["keep"].cpu()
        row_B, first = self._stack_rows(source_B, keep_B)
        options = {}
        if self.sources.state_S is not None:
            options["state_B"] = self.sources.state_S[source_B[first]].to(device)
        if self.sources.condition_SE is not None:
            options["condition_BE"] = self.sources.condition_SE[source_B[first]].to(device)
            if self.drop_condition:
                options["keep_B"] = keep_B[first].to(device)
        if self.config.head == "diffusion":
            options["t_R"] = draws["t"].flatten()
            options["eps_RD"] = self._noise(draws["noise"], device)
            options["rows_per_pass"] = self.rows_per_pass
        loss_sum = model(
            x0_RD.to(device, non_blocking=True),
            row_B.repeat_interleave(self.tokens_per_network).to(device),
            token_Bk.flatten().to(device),
            **options,
        )
        return StepOutput(loss_sum=loss_sum)

    def _stack_rows(self, source_B: Tensor, keep_B: Tensor) -> tuple[Tensor, Tensor]:
        """Which run of the stack serves each network, and the first network that each run is for."""
        if not self.shared:
            return torch.arange(len(source_B)), torch.arange(len(source_B))
        keys = (2 * source_B + keep_B).tolist()
        numbers: dict[int, int] = {}
        row_B = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
        return row_B, torch.tensor([keys.index(key) for key in numbers])

    def _noise(self, seeds_B: Tensor, device: torch.device) -> Tensor:
        """``(R, D)``: a stream of its own for each network, so that only this process's rows are drawn."""
        shape = (self.tokens_per_network, self.config.dim_per_token)
        streams = [torch.Generator(device).manual_seed(seed) for seed in seeds_B.tolist()]
        return torch.cat([torch.randn(shape, generator=stream, device=device) for stream in streams])

    # ---------------------------------------------------------------- what the engine optimises and reports

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict]:
        """Everything decays, as released, except what Mamba-2 marks as free of decay."""
        free = ("A_log", "dt_bias", ".D")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return [
            {"params": [p for name, p in named if not name.endswith(free)], "weight_decay": weight_decay},
            {"params": [p for name, p in named if name.endswith(free)], "weight_decay": 0.0},
        ]

    def repeated_blocks(self, model: nn.Module) -> list[nn.Module]:
        return model.blocks()

    def flops_per_sample(self, model: nn.Module) -> float:
        """Of one network of a batch whose sources are all different: the stack once, and its share of the denoiser."""
        config = self.config
        total = 2.0 * config.num_tokens * sum(p.numel() for p in model.model.parameters() if p.ndim > 1)
        if config.head == "diffusion":
            per_row = row_flops(config.channels, config.kernel_size, config.dim_per_token)
            per_row += 2.0 * sum(
                p.numel() for name, p in model.denoiser.named_parameters() if p.ndim == 2 and "embedder" in name
            )
            total += self.tokens_per_network * per_row
        return 3.0 * total

    def samples_to_tokens(self) -> int:
        return self.tokens_per_network
