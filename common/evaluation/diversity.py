"""How varied sampled sequences are: unigram entropy and distinct n-grams.

Dimensions: L positions of one sequence.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence

from common.config import require_at_least
from common.errors import DataError
from common.evaluation.metric import Metric, mean_metric


def unigram_entropy(tokens_L: Sequence[Hashable]) -> float:
    """Entropy in nats of the token frequencies within one sequence; at most ln L, 0 for a repeated token.

    Source: the entropy column of arXiv 2406.03736, table 3 (averaged over sequences).
    Raises: DataError for an empty sequence.
    """
    if len(tokens_L) == 0:
        raise DataError("a sequence has no tokens, so it has no entropy; leave empty samples out.")
    total = len(tokens_L)
    return -sum(count / total * math.log(count / total) for count in Counter(tokens_L).values())


def distinct_n(sequences: Iterable[Sequence[Hashable]], n: int) -> float:
    """Different n-grams over all n-grams, pooled over the sequences; 1 means that none is repeated.

    Depends on how many tokens are pooled, so compare equal amounts only. NaN if no sequence has n tokens.
    """
    require_at_least("n", n, 1)
    seen: set[tuple] = set()
    total = 0
    for tokens in sequences:
        grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else math.nan


def diversity(sequences: Sequence[Sequence[Hashable]], orders: Sequence[int] = (1, 2, 3)) -> Iterator[Metric]:
    """Mean unigram entropy (nats, standard error over sequences) and distinct-n of each order.

    Raises: DataError for an empty list or an empty sequence.
    """
    if not sequences:
        raise DataError("there are no sequences to measure.")
    yield mean_metric("unigram_entropy", [unigram_entropy(tokens) for tokens in sequences])
    for n in orders:
        yield Metric(f"distinct_{n}", distinct_n(sequences, n))
