"""What a training run leaves behind at intervals: the model as it is, and texts written with it.

Dimensions: B texts, L positions, N new tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.data.tokenizer import Tokenizer
from common.diffusion.categorical import TokenDraw
from common.seeding import derive_seed
from common.trainer import TrainState
from diffullama.autoregressive import continue_causally
from diffullama.building import Start
from diffullama.lora import has_adapter, save_adapter
from diffullama.model import DiffusionLM
from diffullama.sampler import fill
from diffullama.saving import model_metadata, save_model, write_metadata

SEPARATOR = "=" * 92
LONGEST_TEXT = 256  # tokens; a snapshot shows what the model does, it does not measure it


class Snapshots:
    """Hook of the trainer that writes, every ``training.snapshot_freq`` steps, into the run folder

    * ``snapshots/iter_{step}``: the weights as a Hugging Face folder, or with LoRA the adapter (not at the end, which
      has ``export/``);
    * ``samples/iter_{step}/sample_{rank}.txt``, also at the end: texts of every process.

    Args:
        examples: ``{"tokens": (B, L), "src_mask": (B, L)}``: pairs whose answers are written; None: texts from nothing.
    """

    at_end = True

    def __init__(self, start: Start, examples: Mapping[str, Tensor] | None = None) -> None:
        self.start, self.config, self.examples = start, start.config, examples
        self.every_steps = start.config.training.snapshot_freq

    def __call__(self, state: TrainState) -> Mapping[str, float] | None:
        texts = self.config.sampling.texts
        with state.eval_model() as model:
            if state.is_main and state.step < state.config.total_steps:
                self._save(model, state)
            if not texts:
                return None
            seed = derive_seed(self.config.seed, "snapshot", state.step)
            if self.examples is not None:
                written, calls = answer(model, self.start, self.examples, seed)
            else:
                rows = range(state.parallel.rank * texts, (state.parallel.rank + 1) * texts)
                written, calls = write_texts(model, self.start, rows, seed)
        path = state.run_dir / "samples" / f"iter_{state.step}" / f"sample_{state.parallel.rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{text}\n{SEPARATOR}\n" for text in written), encoding="utf-8")
        total, count = state.parallel.sum([calls * len(written), float(len(written))])
        return {"snapshot/calls": total / count}

    def _save(self, model: DiffusionLM, state: TrainState) -> None:
        folder = state.run_dir / "snapshots" / f"iter_{state.step}"
        start, metadata = self.start, {**self.start.metadata, "step": state.step}
        if has_adapter(model) and start.has_stored_base:
            save_adapter(folder, model, base_model=self.config.model.path)
            write_metadata(folder, model_metadata(model, start.special, metadata))
        else:
            save_model(folder, model, start.tokenizer, start.special, metadata=metadata, overwrite=True)


@torch.no_grad()
def write_texts(model: DiffusionLM, start: Start, rows: range, seed: int) -> tuple[list[str], float]:
    """Texts from nothing but the begin-of-text token, and network calls of each, by the stage's own sampler."""
    sampling = start.config.sampling
    length = min(start.config.model.length, LONGEST_TEXT)
    draw = TokenDraw(strategy="top_p", para=sampling.top_p, temperature=sampling.temperature)
    first_id = start.special.bos_id if start.special.bos_id is not None else start.special.eos_id
    tokens_BL = torch.full((len(rows), length), first_id, device=model.device)
    if start.config.objective.is_causal:
        new_BN = continue_causally(model, tokens_BL[:, :1], length - 1, draw=draw, seed=seed, rows=rows)
        return [decode(start.tokenizer, new_N.tolist()) for new_N in new_BN], float(length - 1)
    given_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    given_BL[:, 0] = True
    sampled = fill(model, tokens_BL, given_BL, seed=seed, rows=rows, order="random", steps=sampling.steps, draw=draw)
    return [decode(start.tokenizer, tokens_L[1:].tolist()) for tokens_L in sampled.tokens_BL], sampled.nfe


@torch.no_grad()
def answer(model: DiffusionLM, start: Start, examples: Mapping[str, Tensor], seed: int) -> tuple[list[str], float]:
    """Prompts with greedy answers, cut at the end of text, and network calls of each."""
    x_BL, given_BL = examples["tokens"].to(model.device), examples["src_mask"].to(model.device).bool()
    prompt_B = given_BL.long().cumprod(dim=1).sum(dim=1).tolist()  # padding of the causal stage is given too
    greedy, length = TokenDraw(strategy="greedy"), x_BL.shape[1]
    if start.config.objective.is_causal:
        answers = [
            continue_causally(model, x_L[None, :n], length - n, draw=greedy, stop_id=start.special.eos_id)[0].tolist()
            if n < length
            else []
            for x_L, n in zip(x_BL, prompt_B, strict=True)
        ]
        calls = sum(len(ids) for ids in answers) / len(answers)
    else:
        steps = start.config.sampling.steps
        sampled = fill(model, x_BL, given_BL, seed=seed, order="confidence", steps=steps, draw=greedy)
        answers = [row_L[n:].tolist() for row_L, n in zip(sampled.tokens_BL, prompt_B, strict=True)]
        calls = sampled.nfe
    texts = []
    for x_L, n, ids in zip(x_BL, prompt_B, answers, strict=True):
        prompt = decode(start.tokenizer, x_L[1 : n - 1].tolist())  # without begin-of-text and separator
        texts.append(f"{prompt}\n{decode(start.tokenizer, until_end(ids, start))}")
    return texts, calls


def until_end(ids: Sequence[int], start: Start) -> list[int]:
    """The ids before the first end-of-text or padding token."""
    ends = {start.special.eos_id, start.special.pad_id}
    return list(ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))])


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of the ids; those of spare embedding rows, which have no text, become U+FFFD."""
    parts, known = [], []
    for token in ids:
        if token < tokenizer.vocab_size:
            known.append(token)
        else:
            parts.append(tokenizer.decode(known) + "\N{REPLACEMENT CHARACTER}")
            known = []
    return "".join(parts) + tokenizer.decode(known)
