"""Writing texts with an adapted model: options, the rows of each process, records.

Dimensions: B rows, L positions.
"""

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from common.diffusion.absorbing import FinishedRow, OnLaunch
from common.diffusion.reveal import GIVEN
from common.diffusion.samplers import PAGE_ROWS, Calls, Sampler
from common.errors import ConfigError
from common.generation.denoising_view import DenoisingView
from common.generation.run import Generation, write_rows
from common.generation.sample_file import SampleFile
from common.parallel import Parallel
from common.precision import autocast, autocast_forward, resolve_precision
from diffullama.generate_config import GenerateConfig
from diffullama.loading import LoadedModel, load_model, warn_unless_adapted
from diffullama.predictions import PredictionRecord, RecordWriter
from diffullama.reference_samplers import sample
from diffullama.requests import Prompt, Request, build_request
from diffullama.sampler import SamplerOptions, build_sampler, require_canvas, require_prefixes
from diffullama.special_tokens import find_family
from diffullama.trace import write_animation


def generate(config: GenerateConfig, parallel: Parallel | None = None) -> Generation:
    """Writes the texts that ``config`` asks for; with several processes each takes every W-th row.

    The tokens of row i depend on the options, the seed and i, not on the batch size or the number of processes (in
    float32; lower precisions round differently in batches of other sizes).

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair, before the first network call.
    """
    parallel = parallel or Parallel(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = torch.device(config.device) if config.device else parallel.device
    prompts = config.read_prompts()
    settings = config.settings(prompts)
    file = SampleFile(config.output, parallel.rank, PredictionRecord)
    present = parallel.from_main(
        file.prepare(settings, overwrite=config.overwrite, resume=config.resume) if parallel.is_main else None
    )
    loaded = load(config, device)
    precision = resolve_precision(config.model_precision, device)
    autocast_forward(loaded.model, precision, device)
    requests = build_requests(config, loaded, prompts)
    rows = range(config.num_samples * len(requests))
    mine = [row for row in rows[parallel.rank :: parallel.world_size] if row not in present]
    if config.engine == "reference":
        run = functools.partial(run_reference, config, loaded)
        expected = Calls(float(config.diffusion_steps), is_bound=True)
    else:
        options = for_model(config, loaded)
        sampler = build_sampler(loaded.model, options, functools.partial(autocast, precision, device))
        for request in requests:
            require_canvas(loaded.model, request.free_L[None])
            if options.cache == "prefix":
                require_prefixes(request.free_L[None])
        run = functools.partial(run_events_of, sampler, config)
        expected = mean_calls([sampler.expected_calls(request.free_L) for request in requests])

    writer = RecordWriter(config, requests, loaded.tokenizer, loaded.special, settings, end_ids(config, loaded))
    show = config.show and parallel.is_main
    with DenoisingView(loaded.tokenizer, loaded.model.mask_id) if show else nullcontext() as view:
        generation = write_rows(
            run(requests, mine, view),
            writer.to_record,
            file,
            parallel,
            total=len(mine),
            expected=expected,
            progress=config.progress and not config.show,
        )
    if config.animation is not None and parallel.is_main:
        write_animation(config.animation, writer.page(generation.records[: config.animation_rows]))
    return generation


def load(config: GenerateConfig, device: torch.device) -> LoadedModel:
    """The model, in eval mode."""
    names = ("mask_token_id", "shift", "attn_implementation", "base", "tokenizer", "ema")
    loaded = load_model(config.model_path, device, **{name: getattr(config, name) for name in names})
    warn_unless_adapted(loaded)
    return loaded


def build_requests(config: GenerateConfig, loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[Request]:
    """The canvas of each prompt."""
    length = config.length or loaded.length
    if length is None and config.max_new_tokens is None:
        raise ConfigError("length has no value and the model names none; give length or max_new_tokens.")
    bos = config.bos
    if bos is None:
        bos = (loaded.model.shift and config.engine == "event") or config.template == "sft"
    family = find_family(loaded.model.config, loaded.tokenizer)
    shape = {"length": length, "max_new_tokens": config.max_new_tokens, "bos": bos, "template": config.template}
    shape["digits"] = family is not None and family.isolates_digits
    given = (loaded.special, loaded.tokenizer)
    return [build_request(prompt, *given, vocab_size=loaded.model.vocab_size, **shape) for prompt in prompts]


def end_ids(config: GenerateConfig, loaded: LoadedModel) -> tuple[int, ...]:
    """Tokens that end a text."""
    if not isinstance(config.stop, bool):
        return tuple(config.stop)
    ids = {loaded.special.eos_id, loaded.special.pad_id} - {None} if config.stop else set()
    if config.stop and not ids:
        raise ConfigError("stop=true, but the model has neither an end-of-text nor a padding id; give stop=[ids].")
    return tuple(sorted(ids))


def for_model(config: GenerateConfig, loaded: LoadedModel) -> SamplerOptions:
    """The sampler's options with the ids that the model brings: no id is written that its tokenizer cannot decode."""
    options = config.sampler_options()
    rows = loaded.model.vocab_size
    known = rows if loaded.tokenizer is None else min(loaded.tokenizer.vocab_size, rows)
    forbid = tuple(sorted({*options.forbid, *range(known, rows)} - {loaded.model.mask_id}))
    stop = end_ids(config, loaded)
    special = loaded.special
    pad = next((token for token in (special.pad_id, special.eos_id, *stop) if token is not None), None)
    return replace(options, forbid=forbid, stop=stop, pad=pad if stop else None)


def mean_calls(calls: Sequence[Calls]) -> Calls:
    """Expected calls of a row of any of the prompts, which are equally frequent."""
    count = max(1, len(calls))
    means = [call.mean for call in calls]
    # the variance of a row's calls given its prompt: the rows of each prompt are known, not drawn
    variance = sum(call.variance for call in calls) / count
    return Calls(sum(means) / count, variance, any(call.is_bound for call in calls))


def by_length(requests: Sequence[Request], rows: Iterable[int]) -> Iterator[list[int]]:
    """Rows whose texts are equally long, in order of the first of them; row i belongs to prompt i mod len(requests)."""
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(len(requests[row % len(requests)].tokens_L), []).append(row)
    return iter(groups.values())


def run_events_of(
    sampler: Sampler,
    config: GenerateConfig,
    requests: Sequence[Request],
    rows: Sequence[int],
    on_launch: OnLaunch | None,
) -> Iterator[FinishedRow]:
    """Every row as it is completed, by a sampler of ``common/diffusion/samplers.py``."""

    def pages(group: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for page in batches(group, PAGE_ROWS):
            chosen = [requests[row % len(requests)] for row in page]
            yield (
                torch.tensor(list(page), dtype=torch.int64),
                torch.stack([request.tokens_L for request in chosen]),
                torch.stack([request.free_L for request in chosen]),
            )

    launches_before = 0
    for group in by_length(requests, rows):
        launches = 0
        options = {"seed": config.seed, "max_rows": config.batch_size, "on_launch": on_launch}
        for row in sampler.run(pages(group), **options):
            launches = max(launches, row.launches)
            yield replace(row, launches=launches_before + row.launches)
        launches_before += launches


def batches(values: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive parts of at most ``size``."""
    return (values[start : start + size] for start in range(0, len(values), size))


def run_reference(
    config: GenerateConfig,
    loaded: LoadedModel,
    requests: Sequence[Request],
    rows: Sequence[int],
    on_launch: OnLaunch | None,
) -> Iterator[FinishedRow]:
    """Every row by a released sampler, exactly: T steps, the mask may be written, with shift the first column is lost.

    A free position 0 of a shifted model holds token 0 once it is committed, as in the released scripts.
    """
    shift, launches = loaded.model.shift, 0
    for group in by_length(requests, rows):
        for page in batches(group, config.batch_size):
            started = time.perf_counter()
            chosen = [requests[row % len(requests)] for row in page]
            free_BL = torch.stack([request.free_L for request in chosen]).to(loaded.model.device)
            tokens_BL = torch.stack([request.tokens_L for request in chosen]).to(loaded.model.device)
            result = sample(
                loaded.model,
                tokens_BL.masked_fill(free_BL, 0),
                (~free_BL).long(),
                config.diffusion_steps,
                config.order,
                config.draw,
                config.logits_temp,
                config.topp_temp,
                shift,
                trace=False,
                top_k=config.top_k,
                score_noise=config.selection_noise,
                forbid=tuple(config.forbid or ()),
                seed=config.seed,
                rows=page,
            )
            launches += result.n_calls
            seconds = time.perf_counter() - started
            for place, row in enumerate(page):
                revealed_L = torch.where(free_BL[place].cpu(), 0, GIVEN)[int(shift) :]
                tokens_L = result.tokens[place].cpu()
                yield FinishedRow(row, tokens_L, int(result.calls_B[place]), revealed_L, launches, seconds)
