"""What a training run leaves behind at intervals: the model as it is, and texts denoised with it.

Dimensions: B texts, L positions.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.data.tokenizer import Tokenizer
from common.diffusion.categorical import TokenDraw
from common.seeding import derive_seed
from common.trainer import TrainState
from diffullama.autoregressive import continue_causally
from diffullama.building import Start
from diffullama.model import DiffusionLM
from diffullama.sampler import fill
from diffullama.saving import save_model

SEPARATOR = "=" * 92
LONGEST_TEXT = 256  # tokens; a snapshot shows what the model does, it does not measure it


class Snapshots:
    """Hook of the trainer that writes, every ``training.snapshot_freq`` steps and at the end, into the run folder

    * ``snapshots/iter_{step}``: the weights as a Hugging Face folder (not at the end, which has ``export/``);
    * ``samples/iter_{step}/sample_{rank}.txt``: texts of every process.
    """

    at_end = True

    def __init__(self, start: Start) -> None:
        self.start, self.config = start, start.config
        self.every_steps = start.config.training.snapshot_freq

    def __call__(self, state: TrainState) -> Mapping[str, float] | None:
        texts = self.config.sampling.texts
        with state.eval_model() as model:
            if state.is_main and state.step < state.config.total_steps:
                folder = state.run_dir / "snapshots" / f"iter_{state.step}"
                save_model(
                    folder,
                    model,
                    self.start.tokenizer,
                    self.start.special,
                    metadata={**self.start.metadata, "step": state.step},
                    overwrite=True,
                )
            if not texts:
                return None
            rows = range(state.parallel.rank * texts, (state.parallel.rank + 1) * texts)
            seed = derive_seed(self.config.seed, "snapshot", state.step)
            tokens_BL, calls = sample_texts(model, self.start, rows, seed)
        path = state.run_dir / "samples" / f"iter_{state.step}" / f"sample_{state.parallel.rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        decoded = [decode(self.start.tokenizer, tokens_L) for tokens_L in tokens_BL]
        path.write_text("".join(f"{text}\n{SEPARATOR}\n" for text in decoded), encoding="utf-8")
        total, count = state.parallel.sum([calls * texts, float(texts)])
        return {"snapshot/calls": total / count}


@torch.no_grad()
def sample_texts(model: DiffusionLM, start: Start, rows: range, seed: int) -> tuple[Tensor, float]:
    """Unconditional texts ``(B, L)`` and network calls of each, by the stage's own sampler."""
    sampling = start.config.sampling
    length = min(start.config.model.length, LONGEST_TEXT)
    draw = TokenDraw(strategy="top_p", para=sampling.top_p, temperature=sampling.temperature)
    first_id = start.special.bos_id if start.special.bos_id is not None else start.special.eos_id
    first_B1 = torch.full((len(rows), 1), first_id, device=model.device)
    if start.config.objective.is_causal:
        new_BN = continue_causally(model, first_B1, length - 1, draw=draw, seed=seed, rows=rows)
        return torch.cat([first_B1, new_BN], dim=1), float(length - 1)
    tokens_BL = first_B1.expand(-1, length).clone()
    given_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    given_BL[:, 0] = True
    sampled = fill(model, tokens_BL, given_BL, seed=seed, rows=rows, order="random", steps=sampling.steps, draw=draw)
    return sampled.tokens_BL, sampled.nfe


def decode(tokenizer: Tokenizer, tokens_L: Tensor) -> str:
    """Text of the ids after the first; those of spare embedding rows, which have no text, become U+FFFD."""
    parts, known = [], []
    for token in tokens_L[1:].tolist():
        if token < tokenizer.vocab_size:
            known.append(token)
        else:
            parts.append(tokenizer.decode(known) + "\N{REPLACEMENT CHARACTER}")
            known = []
    return "".join(parts) + tokenizer.decode(known)
