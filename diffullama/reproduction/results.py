"""From the jobs' results to the section: tables, checks, figures, infilled texts."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from common.report import Check, Section, Table
from diffullama.reproduction.checks import adaptation_checks
from diffullama.reproduction.figures import curve_figure, infill_figure
from diffullama.reproduction.settings import Settings

TEXT = """
A small GPT-2 is trained on the help texts inside Python (byte pairs, blocks of 64) to predict the next token, and then
turned into a masked diffusion model: the same weights, the shift kept, attention opened step by step from causal to
full, loss on masked tokens weighted by 1/t. Two networks of the same size learn diffusion from scratch: scratch= for as
many diffusion steps, scratch+ on as many tokens as parent and adaptation together. Each arm has the better of two
learning rates, found beforehand.

What has to come out: the adapted network bounds held-out text better than both, predicts single hidden tokens better
than scratch+, and uses the text after a gap. What is not claimed: on hidden tokens and spans the adapted network is not
better than its own AR parent at this size, although that sees the left context only.
"""


def plus_minus(value: Mapping, error: str = "error", digits: int = 3) -> str:
    """A mean and its standard error as text."""
    return f"{value['mean']:.{digits}f} ± {value[error]:.{digits}f}"


def arm_table(settings: Settings, scores: Mapping[str, Mapping]) -> Table:
    """The main table: one row per network."""
    rows = []
    for arm in settings.arms():
        score = scores[arm.name]
        tokens = (arm.steps + (settings.ar_steps if arm.parent else 0)) * settings.batch_size * settings.length
        nats = score["bound"]
        rows.append(
            [
                arm.label,
                arm.steps,
                f"{tokens / 1e6:.2f} M",
                settings.learning_rates[arm.name],
                plus_minus(nats, "mask_error" if "mask_error" in nats else "error")
                if arm.kind != "ar"
                else f"{nats['mean']:.3f} (exact)",
                math.exp(nats["mean"]),
                plus_minus(score["cloze"]["nll"]),
                f"{100 * score['cloze']['accuracy']['mean']:.1f} %",
            ]
        )
    columns = ["arm", "steps", "tokens in all", "learning rate", "bound", "PPL bound", "cloze CE", "cloze top-1"]
    caption = (
        "Bound on the NLL of held-out text, nats per token ± Monte-Carlo standard error of the masks. Cloze: single "
        "hidden tokens, ± standard error over blocks; the AR parent sees the left context only."
    )
    return Table(name="arms", columns=columns, rows=rows, caption=caption)


def infill_table(settings: Settings, scores: Mapping[str, Mapping]) -> Table:
    """Hidden spans: loss with and without the text after them, and greedy infilling."""
    rows = []
    for arm in settings.arms():
        score = scores[arm.name]
        found = score.get("spans")
        numbers = [plus_minus(found[kind]) for kind in ("with_suffix", "without_suffix")] if found else [None, None]
        gain = plus_minus(found["gain"], digits=4) if found else None
        rows.append([arm.label, *numbers, gain, f"{100 * score['infill']['accuracy']['mean']:.1f} %"])
    columns = ["arm", "CE with suffix", "CE without suffix", "paired gain", "tokens right, greedy infill"]
    caption = (
        f"Spans of {settings.span} hidden tokens, mean of {len(settings.span_starts)} places a block, ± standard error "
        "over blocks. Greedy infilling of the middle span in order of confidence; AR parent: greedy continuation of "
        "the prefix."
    )
    return Table(name="infilling", columns=columns, rows=rows, caption=caption)


def curve_table(settings: Settings, curves: Mapping[str, Mapping]) -> Table:
    """Points of the curves; the figure's source."""
    rows = []
    for arm in settings.arms():
        found = curves[arm.name]
        for step, bound in zip(found["validation_steps"], found["validation_bounds"], strict=True):
            near = [loss for at, loss in zip(found["steps"], found["losses"], strict=True) if step - 25 < at <= step]
            rows.append([arm.label, step, bound, fmean(near) if near else None])
    columns = ["arm", "step", "held-out bound", "training loss (mean of the last 25 steps)"]
    return Table(name="curves", columns=columns, rows=rows, caption="Nats per token; the AR parent's are exact NLLs.")


def seeds_table(settings: Settings, scores: Mapping[int, Mapping[str, Mapping]]) -> Table:
    """Mean and spread over seeds of the bound."""
    rows = []
    for arm in settings.arms():
        values = [by_arm[arm.name]["bound"]["mean"] for by_arm in scores.values()]
        rows.append([arm.label, len(values), fmean(values), stdev(values), min(values), max(values)])
    columns = ["arm", "seeds", "mean bound", "sd over seeds", "least", "most"]
    return Table(name="seeds", columns=columns, rows=rows, caption="Bounds in nats per token over seeds.")


def listing(score: Mapping) -> str:
    """A few infilled texts, the written span in double brackets, the true one below."""
    parts = []
    for text in score["texts"]:
        parts.append(f"{text['prefix']}[[{text['written']}]]{text['suffix']}\n--- true: [[{text['true']}]]")
    return "\n\n========\n\n".join(parts)


def build_section(settings: Settings, seeds: Sequence[int], results: Mapping[str, Mapping], facts: Mapping) -> Section:
    """The section of all seeds; figures and the main tables show the first one.

    Args:
        results: by job name, see ``diffullama/reproduce.py``.
        facts: provenance and duration.
    """
    names = [arm.name for arm in settings.arms()]
    scores = {seed: {name: results[f"score-{name}-seed{seed}"] for name in names} for seed in seeds}
    first, curves = scores[seeds[0]], {name: results[f"train-{name}-seed{seeds[0]}"] for name in names}
    checks: list[Check] = []
    for seed in seeds:
        checks += adaptation_checks(scores[seed], f" (seed {seed})" if len(seeds) > 1 else "")
    tables = [arm_table(settings, first), infill_table(settings, first)]
    if len(seeds) > 1:
        tables.append(seeds_table(settings, scores))
    tables.append(curve_table(settings, curves))
    start = results[f"start-seed{seeds[0]}"]["bound"]
    text = TEXT + (
        f"\nBefore its first diffusion step the AR parent, asked under full attention, has a bound of "
        f"{start['mean']:.2f} nats per token; a uniform guess has {math.log(settings.vocab_size):.2f}.\n"
    )
    return Section(
        title="DiffuLLaMA: adapting an autoregressive model to diffusion",
        text=text,
        checks=checks,
        tables=tables,
        figures=[curve_figure(settings, curves), infill_figure(settings, first)],
        facts=dict(facts),
        listings={
            "infilled by the adapted network (greedy, in order of confidence)": listing(first["adapt"]),
            "continued by the AR parent (greedy, prefix only)": listing(first["ar"]),
        },
    )
