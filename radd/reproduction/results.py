"""From the jobs' results to the section: tables, checks, figures."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from common.report import Check, Section, Table
from radd.losses import LOSS_TYPES
from radd.reproduction.checks import bound_checks, calls_check, precision_checks
from radd.reproduction.figures import bound_figure, calls_figure, loss_figure, precision_figure
from radd.reproduction.sampling import ONE_STAGE
from radd.reproduction.settings import Settings

TEXT = """
Absorbing discrete diffusion with a network that never sees the time, trained on the help texts inside Python (bytes,
blocks of 64) with four losses that are equal in expectation. A loss estimates an upper bound on the negative
log-likelihood; every trained network is scored by all four. All numbers are nats per byte.

What has to come out: all bounds below 2.65; for each network, the four estimates agree within their Monte-Carlo errors
(after the known correction for the masking levels that the t losses leave out); the mean likelihood over random orders
is the same bound; the sampler calls the network as often as the theory says; and categorical draws in one stage lose
rare tokens in half and single precision, but not in double precision or in two stages.
"""


# ---------------------------------------------------------------- tables


def bound_table(scores: Mapping[str, Mapping], curves: Mapping[str, Mapping]) -> Table:
    """Rows: the loss trained with; columns: the estimator."""
    rows = []
    for row, score in scores.items():
        cells = score["cells"]
        values = [f"{cells[name]['mean']:.3f} ± {cells[name]['error']:.3f}" for name in LOSS_TYPES]
        rows.append([row, *values, f"{curves[row]['last']:.2f} / {curves[row]['last_deviation']:.3f}"])
    columns = ["trained with ↓ scored by →", *LOSS_TYPES, "last training loss / its sd per step"]
    caption = (
        "Bound in nats per byte ± Monte-Carlo standard error; the same test sequences and masks for all networks. All "
        "start from the same weights and see the same batches; t_DSE and t_DCE also share gradients, so they coincide."
    )
    return Table(name="bounds", columns=columns, rows=rows, caption=caption)


def estimator_table(scores: Mapping[str, Mapping]) -> Table:
    """One row per network and estimator, with every digit; the bound table's source."""
    rows = []
    for row, score in scores.items():
        for name, cell in score["cells"].items():
            corrected = cell["mean"] - cell["range"]
            rows.append([row, name, cell["mean"], cell["error"], cell["deviation"], cell["range"], corrected])
        if "orders" in score:
            orders = score["orders"]["random"]
            name = f"{orders['count']} random orders"
            rows.append([row, name, orders["mean"], orders["error"], orders["deviation"], 0.0, orders["mean"]])
            for name in ("ar_forward", "ar_backward"):
                rows.append([row, name, score["orders"][name], None, None, 0.0, score["orders"][name]])
    columns = ["trained with", "estimator", "bound", "standard error", "sd of one draw", "range term", "corrected"]
    caption = (
        "sd of one draw: of one network call on one sequence (of a whole order: as many calls as tokens). The t losses "
        "leave out the lowest and highest masking levels, which the range term accounts for."
    )
    return Table(name="estimators", columns=columns, rows=rows, caption=caption)


def calls_table(calls: Mapping) -> Table:
    """Measured calls by number of steps."""
    rows = [
        [p["steps"], p["expected"], p["measured"], p["deviation"], f"{p['least']}–{p['most']}", p["launches"]]
        for p in calls["points"]
    ]
    columns = ["steps n", "E-NFE(n)", "measured calls per row", "sd of the mean", "range over rows", "launches"]
    caption = (
        f"Event-driven sampling of {calls['rows']} sequences, {calls['noise']} noise. A launch evaluates all rows that "
        "still have a step with a change; one call per step would need n launches."
    )
    return Table(name=f"calls-{calls['noise']}", columns=columns, rows=rows, caption=caption)


def precision_table(shares: Mapping[str, Mapping]) -> Table:
    """Tail share and mean surprise by precision of the draws."""
    rows = [
        [mode, found["tokens"], found["share"], found["error"], found["surprise"]] for mode, found in shares.items()
    ]
    first = next(iter(shares.values()))
    rows.append(["exact", None, first["true_share"], None, first["entropy"]])
    columns = ["draws", "tokens", "share of rank >= 1000", "binomial error", "mean -ln p (nats)"]
    caption = (
        "1024 steps on a constant Zipf distribution over 8000 tokens; float64, float32, float16 draw in one stage."
    )
    return Table(name="precision", columns=columns, rows=rows, caption=caption)


def seeds_table(scores: Mapping[int, Mapping[str, Mapping]]) -> Table:
    """Mean and spread over seeds of the bound by the lowest-variance loss."""
    rows = []
    for row in next(iter(scores.values())):
        values = [by_loss[row]["cells"]["k_DCE"]["mean"] for by_loss in scores.values()]
        rows.append([row, len(values), fmean(values), stdev(values), min(values), max(values)])
    columns = ["trained with", "seeds", "mean bound (k_DCE)", "sd over seeds", "least", "most"]
    return Table(
        name="seeds", columns=columns, rows=rows, caption="Differences between losses against the spread over seeds."
    )


def baseline_table(baselines: Mapping[str, float], score: float) -> Table:
    """What simple models reach on the same bytes."""
    rows = [[name, value] for name, value in baselines.items()] + [["RADD, mean of the k_DCE column", score]]
    return Table(name="baselines", columns=["model", "nats per byte"], rows=rows)


# ---------------------------------------------------------------- the section


def with_orders(results: Mapping[str, Mapping], name: str) -> dict:
    """The scores of a network, with those over orders under ``"orders"`` where there are any."""
    score = dict(results[f"score-{name}"])
    if f"orders-{name}" in results:
        score["orders"] = results[f"orders-{name}"]
    return score


def build_section(settings: Settings, seeds: Sequence[int], results: Mapping[str, Mapping], facts: Mapping) -> Section:
    """The section of all seeds; figures and the main tables show the first one.

    Args:
        results: by job name, see ``radd/reproduce.py``.
        facts: provenance and duration.
    """
    scores = {
        seed: {loss: with_orders(results, f"{loss}-seed{seed}") for loss in settings.loss_types} for seed in seeds
    }
    curves = {loss: results[f"train-{loss}-seed{seeds[0]}"] for loss in settings.loss_types}
    baselines = results["baselines"]
    checks: list[Check] = []
    for seed in seeds:
        suffix = f" (seed {seed})" if len(seeds) > 1 else ""
        calls = results[f"calls-loglinear-seed{seed}"]
        shares = {mode: results[f"precision-{mode}-seed{seed}"] for mode in ("two-stage", *ONE_STAGE)}
        checks += [*bound_checks(scores[seed], suffix), calls_check(calls, suffix), *precision_checks(shares, suffix)]
        if seed == seeds[0]:
            first_calls, first_shares = calls, shares
    first = scores[seeds[0]]
    mean_bound = fmean(score["cells"]["k_DCE"]["mean"] for score in first.values())
    tables = [bound_table(first, curves), baseline_table(baselines, mean_bound), calls_table(first_calls)]
    tables += [precision_table(first_shares), estimator_table(first)]
    figures = [loss_figure(curves), bound_figure(first, baselines), calls_figure(first_calls, settings.length)]
    figures.append(precision_figure(first_shares))
    if len(seeds) > 1:
        tables.insert(1, seeds_table(scores))
    for loss in settings.geometric_losses:
        geometric = {f"{loss}, geometric": results[f"score-{loss}-geometric-seed{seeds[0]}"]}
        checks += bound_checks(geometric, " (geometric noise)")
        calls = results[f"calls-geometric-seed{seeds[0]}"]
        checks.append(calls_check(calls))
        tables += [calls_table(calls)]
        figures.append(calls_figure(calls, settings.length))
    sample = first_calls["sample"]
    return Section(
        title="RADD: absorbing discrete diffusion without time",
        text=TEXT,
        checks=checks,
        tables=tables,
        figures=figures,
        facts=dict(facts),
        listings={f"a sample of {settings.length} bytes": sample},
    )
