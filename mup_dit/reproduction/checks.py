"""The reproduction's thresholds: what must come out, judged from the jobs' results."""

from collections.abc import Mapping

from common.report import Check
from mup_dit.reproduction.settings import LABELS, SP_EDGE_DROP, SP_REGRET
from mup_dit.sweep import ARGMIN_SPREAD, EDGE_SPREAD, REGRET_LIMIT, VERTEX_SPREAD, Transfer


def octaves(values: Mapping[int, float]) -> str:
    """``32: -7, 64: -7``."""
    return ", ".join(f"{width}: {value:.3g}" for width, value in values.items())


def transfer_checks(mup: Transfer, sp: Transfer, regrets: Mapping[str, float], suffix: str = "") -> list[Check]:
    """Claims (a) to (d) of one seed.

    Args:
        regrets: parametrisation -> relative loss of the widest network at the narrowest one's best rate.
    """
    argmins = octaves({width: optimum.loglr for width, optimum in mup.optima.items()})
    vertices = octaves({width: optimum.vertex for width, optimum in mup.optima.items()})
    mup_edges = octaves({width: optimum.edge for width, optimum in mup.optima.items()})
    sp_edges = octaves({width: optimum.edge for width, optimum in sp.optima.items()})
    return [
        Check(
            claim=f"(a) muP: the best rate stays{suffix}",
            measured=f"best log2 rate {argmins}; fitted {vertices}",
            threshold=f"spread <= {ARGMIN_SPREAD:g}; fitted <= {VERTEX_SPREAD:g}",
            passed=mup.argmin_spread <= ARGMIN_SPREAD and mup.vertex_spread <= VERTEX_SPREAD,
        ),
        Check(
            claim=f"(b) muP: the edge of divergence stays{suffix}",
            measured=f"log2 edge {mup_edges}",
            threshold=f"spread <= {EDGE_SPREAD:g}, not falling",
            passed=mup.edge_spread <= EDGE_SPREAD and mup.edge_drop <= 0,
        ),
        Check(
            claim=f"(c) SP: the edge of divergence falls{suffix}",
            measured=f"log2 edge {sp_edges}",
            threshold=f"falls by >= {SP_EDGE_DROP:g}",
            passed=sp.edge_drop >= SP_EDGE_DROP,
        ),
        Check(
            claim=f"(d) muP: the narrow network's rate serves the wide one{suffix}",
            measured=f"regret {100 * regrets['mup']:+.1f} %",
            threshold=f"<= {100 * REGRET_LIMIT:g} %",
            passed=regrets["mup"] <= REGRET_LIMIT,
        ),
        Check(
            claim=f"(d) SP: the narrow network's rate ruins the wide one{suffix}",
            measured=f"regret {100 * regrets['sp']:+.1f} %",
            threshold=f">= {100 * SP_REGRET:g} %",
            passed=regrets["sp"] >= SP_REGRET,
        ),
    ]


def convergence_check(mup_loss: float, sp_loss: float, steps: tuple[int, int], suffix: str = "") -> Check:
    """Claim (e): muP at the transferred rate beats SP at its customary rate after 2.9 times the steps."""
    return Check(
        claim=f"(e) muP after {steps[0]} steps beats SP at its customary rate after {steps[1]}{suffix}",
        measured=f"{mup_loss:.4f} against {sp_loss:.4f}",
        threshold="less",
        passed=mup_loss < sp_loss,
    )


def coordinate_checks(verdicts: Mapping[str, Mapping], suffix: str = "") -> list[Check]:
    """muP passes the coordinate check; what is not muP fails it."""
    found = []
    for name, verdict in verdicts.items():
        steepest, limit = verdict["steepest"], verdict["limit"]
        is_mup = name == "mup"
        where = f"{steepest['module'] or 'output'}, step {steepest['step']}" if steepest else "nothing measurable"
        found.append(
            Check(
                claim=f"coordinate check: {LABELS[name]} {'passes' if is_mup else 'fails'}{suffix}",
                measured=f"steepest slope {steepest['slope']:+.3f} ({where})" if steepest else where,
                threshold=f"|slope| {'<=' if is_mup else '>'} {limit:g}",
                passed=verdict["passed"] == is_mup,
            )
        )
    return found
