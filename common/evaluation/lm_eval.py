"""Masked-diffusion models in EleutherAI's lm-evaluation-harness (0.4.13), which finds no plug-ins by itself.

    python -m common.evaluation.lm_eval --model quintet_diffusion --tasks lambada_openai,hellaswag \
        --model_args loader=radd,pretrained=runs/first,draws=64 --batch_size 32 --output_path logs/lm_eval

registers the model and calls the harness's own command line; all of its options work. ``loader`` names who loads
``pretrained``: a paper's package, or ``package.module:function`` (``masked_model.py``).

Conditional likelihood: the context stays visible, only the l tokens of the continuation are masked, and minus the bound
``sum_k S_k / k`` over counts k = 1..l is returned; exact for l = 1, and by all 2^l - 1 masks if these take no more than
``draws`` rows. As in the harness's own models, texts get the special tokens that their tokenizer puts in front, spaces
at the end of a context belong to the continuation, and there is always a token of context: beginning-of-text, or where
there is none end-of-text (a model that keeps the autoregressive shift cannot predict a first token).

Dimensions: B requests of one length, R rows, L positions, P masked positions, V vocabulary.
"""

import hashlib
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from common.config import require_at_least, require_choice
from common.diffusion.categorical import TokenDraw
from common.diffusion.decoding import run_selection
from common.diffusion.orders import SelectionRule
from common.errors import ConfigError, QuintetError
from common.evaluation.masked_model import MaskedLanguageModel, beginning_id, leading_ids, load_masked_model
from common.evaluation.perplexity import MaskedRows, conditional_replicates, evaluate_rows, join_rows
from common.parallel import Parallel, start
from common.seeding import generator

logger = logging.getLogger(__name__)

GREEDY_CHECKS = ("confidence", "none")
REQUESTS_AHEAD = 64  # requests of one length whose rows are prepared together


@dataclass(frozen=True)
class _Scored:
    """A continuation to score: ids of context and continuation, the first ``visible`` of which are the context.

    Attributes:
        shares_masks: continuations of one context get common random numbers, so that their difference, which decides a
            multiple choice, has less noise.
    """

    tokens: list[int]
    visible: int
    shares_masks: bool = False

    @property
    def key(self) -> int:
        """A 63-bit digest of the request, from which its random numbers are drawn: neither order nor rank matters."""
        tokens = self.tokens[: self.visible] if self.shares_masks and self.visible > 1 else self.tokens
        text = f"{self.visible}:{tokens}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@register_model("quintet_diffusion")
class DiffusionLM(TemplateLM):
    """A masked-diffusion model behind the harness's three request types.

    Args:
        pretrained: path or hub name, for the loader; or a ``MaskedLanguageModel``.
        loader: who loads it, see ``masked_model.find_loader``.
        draws: network rows per scored continuation; fewer if all masks take fewer.
        is_greedy: how the harness's "is the continuation what greedy decoding gives" is decided: ``confidence`` fills
            the most confident position first, ``none`` answers no (and saves the calls).
        batch_size: network rows per forward pass.
        max_length: tokens of context and continuation together; None: the model's.
        max_gen_toks: tokens generated per request unless the task says otherwise.
        gen_steps: network calls per generated block; None: one per token.
        gen_order: which positions generation fills first (``common/diffusion/orders.py``).
        gen_block: fills blocks of so many tokens from left to right; None: all at once.
        seed: of masks and draws.
        options: passed on to the loader, for example ``ema`` or ``precision``.

    Attributes:
        processes: of a run under torchrun, which share the requests; None: this process does all.

    Raises: ConfigError for a missing or unknown option.
    """

    processes: Parallel | None = None

    def __init__(
        self,
        pretrained: str | MaskedLanguageModel | None = None,
        loader: str | None = None,
        draws: int = 128,
        is_greedy: str = "confidence",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        gen_steps: int | None = None,
        gen_order: str = "confidence",
        gen_block: int | None = None,
        seed: int = 0,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal():
            raise ConfigError(f"batch_size={batch_size} must be a number of network rows, for example 32.")
        for name, value in (("draws", draws), ("batch_size", int(batch_size)), ("max_gen_toks", max_gen_toks)):
            require_at_least(name, value, 1)
        require_choice("is_greedy", is_greedy, GREEDY_CHECKS)
        alone = Parallel(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.parallel = self.processes or alone
        self._rank, self._world_size = self.parallel.rank, self.parallel.world_size
        if isinstance(pretrained, MaskedLanguageModel):
            self.masked = pretrained
        else:
            if not pretrained or not loader:
                raise ConfigError(
                    "--model_args needs loader=... and pretrained=..., for example loader=radd,pretrained=runs/first."
                )
            self.masked = load_masked_model(loader, str(pretrained), self._choose_device(device), **options)
        self.draws, self.greedy_check, self.batch_size, self.seed = int(draws), is_greedy, int(batch_size), int(seed)
        self.max_length = min(int(max_length or self.masked.length), self.masked.length)
        require_at_least("max_length", self.max_length, 2)
        self.max_gen_toks, self.gen_block = int(max_gen_toks), gen_block
        self.gen_order, self.gen_steps = gen_order, gen_steps
        self._device = self.masked.device
        self.tokenizer = getattr(self.masked.tokenizer, "tokenizer", None)  # the library's, for chat templates
        self._leading = leading_ids(self.masked.tokenizer)
        self._warned = False

    # ---------------------------------------------------------------- processes

    def _choose_device(self, asked: str | None) -> torch.device:
        """The harness passes its default ``cuda:0`` as if it had been asked for: then, and under torchrun, this
        process's GPU, or the CPU where there is none."""
        if asked is None or (asked.startswith("cuda") and (asked in ("cuda", "cuda:0") or self.world_size > 1)):
            return self.parallel.device
        return torch.device(asked)

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = self.parallel.gather(tensor.cpu())
        return torch.stack([part.reshape(()) for part in parts]) if tensor.dim() == 0 else torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list | None:
        parts = self.parallel.gather(obj)
        return parts if self.rank == dst else None

    def barrier(self) -> None:
        self.parallel.barrier()

    # ---------------------------------------------------------------- text

    @property
    def eot_token_id(self) -> int:
        return self.masked.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return f"{self.masked.name}-{self.masked.tokenizer.fingerprint()[:12]}".replace("/", "__")

    @property
    def prefix_token_id(self) -> int:
        return beginning_id(self.masked.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = self.masked.tokenizer.encode(string)
        if add_special_tokens is False or not self._leading or ids[: len(self._leading)] == self._leading:
            return ids
        return [*self._leading, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if continuation_ids:
            return context_ids, continuation_ids
        # The tokenizer merged the whole continuation into the context's last token: nothing would be scored, and the
        # answer would be a likelihood of one. Then the two are encoded apart.
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.tokenizer is None:
            raise ConfigError("--apply_chat_template needs a Hugging Face tokenizer, which this model does not have.")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # ---------------------------------------------------------------- likelihood

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        windows, owner = [], []
        for index, (_, context, continuation) in enumerate(requests):
            for window in self._windows(context, continuation):
                windows.append(window)
                owner.append(index)
        nats = self._bounds(windows, disable_tqdm)
        matches = self._greedy_matches(windows, disable_tqdm) if self.greedy_check == "confidence" else None
        total, is_greedy = [0.0] * len(requests), [self.greedy_check != "none"] * len(requests)
        for place, index in enumerate(owner):
            total[index] -= nats[place]
            is_greedy[index] &= matches is not None and matches[place]
        answers = list(zip(total, is_greedy, strict=True))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _windows(self, context: Sequence[int], continuation: Sequence[int]) -> Iterator[_Scored]:
        """The request cut to the model's length: early context is dropped; a longer continuation comes in parts, each
        seeing half a window of what precedes it. There is always a token of context."""
        part = self.max_length - 1 if len(continuation) < self.max_length else self.max_length // 2
        seen = list(context) or [self.prefix_token_id]
        for first in range(0, len(continuation), part):
            piece = list(continuation[first : first + part])
            kept = seen[max(0, len(seen) - (self.max_length - len(piece))) :]
            yield _Scored(kept + piece, len(kept), shares_masks=True)
            seen += piece

    def _bounds(self, windows: Sequence[_Scored], disable_tqdm: bool) -> list[float]:
        """Minus log-likelihood bound of every window in nats; rows of equally long windows share forward passes."""
        nats = [0.0] * len(windows)
        with tqdm(total=len(windows), desc="Likelihoods", disable=disable_tqdm or self.rank > 0) as bar:
            for places in _by_length(windows):
                x_BL = torch.tensor([windows[place].tokens for place in places], device=self._device)
                parts: list[MaskedRows] = []
                replicates = []
                for row, place in enumerate(places):
                    found = list(self._replicates(windows[place]))
                    replicates.append(len(found))
                    for rows in found:
                        rows.sequence_R = torch.full_like(rows.sequence_R, row)
                    parts += found
                joined = join_rows(parts)
                value_R = evaluate_rows(
                    self.masked.token_nll, x_BL, joined, mask_id=self.masked.mask_id, batch_size=self.batch_size
                )
                sum_B = torch.zeros(len(places), dtype=torch.float64).index_add_(0, joined.sequence_R, value_R)
                for place, value, count in zip(places, sum_B.tolist(), replicates, strict=True):
                    nats[place] = value / count
                bar.update(len(places))
        return nats

    def _replicates(self, window: _Scored) -> Iterator[MaskedRows]:
        hidden_L = torch.arange(len(window.tokens)) >= window.visible
        rng = generator(self.seed, "lm-eval masks", window.key)
        return conditional_replicates(hidden_L, draws=self.draws, rng=rng)

    @torch.no_grad()
    def _greedy_matches(self, windows: Sequence[_Scored], disable_tqdm: bool) -> list[bool]:
        """Whether filling the most confident position first, with its likeliest token, gives the continuation."""
        matches = [True] * len(windows)
        with tqdm(total=len(windows), desc="Greedy checks", disable=disable_tqdm or self.rank > 0) as bar:
            for group in _by_length(windows):
                for start_at in range(0, len(group), self.batch_size):
                    places = group[start_at : start_at + self.batch_size]
                    for place, match in zip(places, self._match([windows[p] for p in places]), strict=True):
                        matches[place] = match
                    bar.update(len(places))
        return matches

    def _match(self, windows: Sequence[_Scored]) -> list[bool]:
        x_BL = torch.tensor([window.tokens for window in windows], device=self._device)
        visible_B = torch.tensor([window.visible for window in windows], device=self._device)
        hidden_BL = torch.arange(x_BL.shape[1], device=self._device) >= visible_B[:, None]
        z_BL = x_BL.masked_fill(hidden_BL, self.masked.mask_id)
        match_B = torch.ones(len(windows), dtype=torch.bool, device=self._device)
        while True:
            active = (match_B & hidden_BL.any(dim=1)).nonzero().squeeze(1)
            if not len(active):
                return match_B.tolist()
            where_RL = hidden_BL[active]
            best_P, token_P = self.masked.denoise(z_BL[active], where_RL).max(dim=1)
            best_RL = torch.full(where_RL.shape, -torch.inf, device=self._device)
            token_RL = torch.zeros_like(where_RL, dtype=torch.int64)
            best_RL[where_RL], token_RL[where_RL] = best_P.float(), token_P
            position_R = best_RL.argmax(dim=1)
            wanted_R = x_BL[active, position_R]
            match_B[active] = token_RL.gather(1, position_R[:, None]).squeeze(1) == wanted_R
            z_BL[active, position_R] = wanted_R
            hidden_BL[active, position_R] = False

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owner = [], []
        for index, (text,) in enumerate(request.args for request in requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # one token of context goes before
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append(_Scored([*context, *continuation], len(context)))
                owner.append(index)
        total = [0.0] * len(requests)
        for index, value in zip(owner, self._bounds(windows, disable_tqdm), strict=True):
            total[index] -= value
        for request, value in zip(requests, total, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return total

    # ---------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = [""] * len(requests)
        repeats: Counter[str] = Counter()
        groups: dict[tuple, list[tuple[int, int, Tensor]]] = {}
        options = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        for index, request in enumerate(requests):
            tokens_L, free = self._canvas(request.args[0], options[index]["max_gen_toks"])
            # the same request asked twice gets other random numbers; its place among the requests does not matter
            digest = hashlib.sha256(f"{request.args}".encode()).digest()
            row = (int.from_bytes(digest[:7], "little") >> 1) + repeats[request.args[0]]
            repeats[request.args[0]] += 1
            groups.setdefault((len(tokens_L), free, self._draw(options[index])), []).append((index, row, tokens_L))
        with tqdm(total=len(requests), desc="Texts", disable=disable_tqdm or self.rank > 0) as bar:
            for (length, free, draw), members in groups.items():
                places = {place: index for place, (index, _, _) in enumerate(members)}
                for place, tokens_L in self._fill([m[2] for m in members], [m[1] for m in members], free, draw):
                    index = places[place]
                    texts[index] = self._cut(tokens_L[length - free :].tolist(), options[index]["until"])
                    self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
                    bar.update()
        return texts

    def _canvas(self, context: str, wanted: int) -> tuple[Tensor, int]:
        """Context and masks after it; how many masks. What does not fit is taken from the masks down to half the
        window, then from the context's beginning."""
        ids = self.tok_encode(context) or [self.prefix_token_id]
        free = min(wanted, max(self.max_length - len(ids), self.max_length // 2))
        if free < wanted and not self._warned:
            logger.warning(
                "max_gen_toks=%d does not fit the model's %d tokens beside the context; texts get %d tokens and fewer.",
                wanted,
                self.max_length,
                free,
            )
            self._warned = True
        ids = ids[-(self.max_length - free) :]
        return torch.tensor(ids + [self.masked.mask_id] * free), free

    def _draw(self, options: dict[str, Any]) -> TokenDraw:
        temperature = float(options.get("temperature") or 0.0)
        if not options.get("do_sample") or temperature == 0:
            return TokenDraw(strategy="greedy")
        for strategy in ("top_p", "top_k", "min_p"):
            if options.get(strategy):
                return TokenDraw(strategy=strategy, para=float(options[strategy]), temperature=temperature)
        return TokenDraw(temperature=temperature)

    def _fill(
        self, canvases: Sequence[Tensor], rows: Sequence[int], free: int, draw: TokenDraw
    ) -> Iterator[tuple[int, Tensor]]:
        """(place among the canvases, finished tokens), in any order."""
        steps = min(self.gen_steps or free, self.gen_block or free)
        place_of: dict[int, int] = {}
        for place, row in enumerate(rows):
            while row in place_of:  # two digests that collide
                row += 1
            place_of[row] = place
        pages = [(torch.tensor(list(place_of), dtype=torch.int64), torch.stack(list(canvases)))]
        finished = run_selection(
            self.masked.denoise,
            pages,
            SelectionRule(order=self.gen_order, steps=steps),
            mask_id=self.masked.mask_id,
            draw=draw,
            seed=self.seed,
            block_length=self.gen_block,
            max_rows=self.batch_size,
            device=self._device,
        )
        return ((place_of[row.index], row.tokens_L) for row in finished)

    def _cut(self, ids: list[int], until: Sequence[str]) -> str:
        """Text up to the end-of-text token or the first stop string."""
        if self.eot_token_id in ids:
            ids = ids[: ids.index(self.eot_token_id)]
        text = self.masked.tokenizer.decode(ids)
        ends = [text.find(stop) for stop in until if stop and stop in text]
        return text[: min(ends)] if ends else text


def _by_length(windows: Sequence[_Scored]) -> Iterator[list[int]]:
    """Places of equally long windows, longest first (an out-of-memory error shows at once)."""
    lengths: dict[int, list[int]] = {}
    for place, window in enumerate(windows):
        lengths.setdefault(len(window.tokens), []).append(place)
    for length in sorted(lengths, reverse=True):
        places = lengths[length]
        yield from (places[first : first + REQUESTS_AHEAD] for first in range(0, len(places), REQUESTS_AHEAD))


def main() -> int:
    """The harness's command line with ``quintet_diffusion`` among its models.

    Returns: 0; exit code 2 after an error that the user can repair.
    """
    try:
        with start("ddp") as parallel:
            DiffusionLM.processes = parallel
            cli_evaluate()
    except QuintetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
