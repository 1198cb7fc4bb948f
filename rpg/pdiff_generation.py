"""Networks from a p-diff baseline.

The noise of a network follows from its own seed, so neither the networks drawn together nor their order changes one.

Dimensions: B networks drawn together, N values of one network, V values that are drawn (N, or those of a latent).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from common.conversion import from_config
from common.errors import CheckpointError
from common.precision import autocast, resolve_precision
from common.provenance import collect
from rpg.codec import TokenCodec
from rpg.generated_files import GeneratedFolder
from rpg.generation import network_seed
from rpg.pdiff import PdiffModel
from rpg.pdiff_config import PdiffGenerateConfig
from rpg.pdiff_saving import LoadedPdiff, load_pdiff
from rpg.requests import Request, build_requests
from rpg.sampling import RowNoise, SamplerConfig, run_sampler
from rpg.testing import TesterSection, TestResult, build_tester

ONE_ROW = slice(0, 1)  # the whole vector is one row of noise


@torch.no_grad()
def draw_vectors(model: PdiffModel, seeds: Sequence[int], sampler: SamplerConfig, *, precision: str = "fp32") -> Tensor:
    """Vectors (B, N) of networks, float32; the model must be in eval mode."""
    device = next(model.parameters()).device
    noise = RowNoise([(seed, ONE_ROW) for seed in seeds], model.size, device)
    with autocast(precision, device):
        if model.config.has_diffusion:
            drawn_BV = run_sampler(model.diffusion.predict_noise, noise.start(), model.diffusion, sampler, noise)
        else:
            drawn_BV = noise.start()
        return model.to_network(drawn_BV).float().cpu()


def generate_networks(
    model: PdiffModel,
    codec: TokenCodec,
    requests: Sequence[Request],
    sampler: SamplerConfig,
    *,
    seed: int,
    batch_size: int = 8,
    precision: str = "fp32",
) -> Iterator[tuple[Request, dict[str, Tensor]]]:
    """State dicts that load with ``strict=True``, in the order of ``requests``.

    Raises: CheckpointError if values are not finite.
    """
    for first in range(0, len(requests), batch_size):
        together = requests[first : first + batch_size]
        seeds = [network_seed(seed, request) for request in together]
        try:
            vectors_BN = draw_vectors(model, seeds, sampler, precision=precision)
        except RuntimeError as error:
            if "not finite" not in str(error):
                raise
            raise CheckpointError(f"the {model.config.kind} baseline cannot generate: {error}") from None
        for request, vector_N in zip(together, vectors_BN, strict=True):
            yield request, codec.decode(vector_N.view(codec.num_tokens, codec.dim))


def run_generation(config: PdiffGenerateConfig) -> list[dict[str, Any]]:
    """Draws, writes and, if asked for, tests the networks; returns their records.

    Raises: CheckpointError if the generator cannot be loaded or a file would be replaced.
    """
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_pdiff(config.generator, device)
    folder = GeneratedFolder(
        config.output, loaded.tag, config.format, overwrite=config.overwrite, adapter_config=loaded.adapter_config
    )
    first = folder.next_indices([""]) if config.append else None
    requests = build_requests(None, config.num_generated, seed=config.seed, first=first)
    return write_networks(
        loaded,
        folder,
        requests,
        config.sampling,
        seed=config.seed,
        batch_size=config.batch_size,
        precision=resolve_precision(config.precision, device),
        tester=read_tester(loaded.tester) if config.test else TesterSection(),
    )


def write_networks(
    loaded: LoadedPdiff,
    folder: GeneratedFolder,
    requests: Sequence[Request],
    sampler: SamplerConfig,
    *,
    seed: int,
    batch_size: int,
    precision: str,
    tester: TesterSection,
) -> list[dict[str, Any]]:
    """Draws ``requests`` into ``folder`` and tests each.

    Raises: CheckpointError if a file is there that must not be replaced.
    """
    folder.check(requests)
    testing = build_tester(tester)
    facts = generation_facts(loaded, sampler, seed)
    records = []
    networks = generate_networks(
        loaded.model, loaded.codec, requests, sampler, seed=seed, batch_size=batch_size, precision=precision
    )
    for request, state in networks:
        own = {"network_seed": network_seed(seed, request)}
        path = folder.write(request, state, facts | own)
        result = testing.test(path) if tester.kind != "none" else TestResult()
        records.append(
            {"file": path.name, "seed": seed, "facts_sha256": facts["facts_sha256"], **own, **_described(result)}
        )
    folder.record(records)
    folder.describe(facts | {"generator": loaded.tag, "num_generated": len(records)})
    return records


def generation_facts(loaded: LoadedPdiff, sampler: SamplerConfig, seed: int) -> dict[str, Any]:
    """What a generated network depends on beside its number; ``facts_sha256`` stands for all of it."""
    options = asdict(sampler)
    facts = {
        "generator_sha256": loaded.digest,
        "model": loaded.model.config.kind,
        "sampling": {field.name: options[field.name] for field in fields(SamplerConfig)},
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {**collect(), **facts, "facts_sha256": digest}


def read_tester(options: Mapping[str, Any] | None) -> TesterSection:
    """The tester that a run's data named."""
    return TesterSection() if options is None else from_config(TesterSection, dict(options))


def _described(result: TestResult) -> dict[str, Any]:
    described = {"loss": result.loss, "accuracy": result.accuracy, "error": result.error}
    return {name: value for name, value in described.items() if value is not None}


def mean_accuracy(records: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Mean accuracy of tested networks and its standard error (NaN for one network); None if none was tested."""
    found = torch.tensor([record["accuracy"] for record in records if record.get("accuracy") is not None])
    if not len(found):
        return None
    error = float(found.double().std() / len(found) ** 0.5) if len(found) > 1 else float("nan")
    return float(found.double().mean()), error
