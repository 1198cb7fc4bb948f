"""Agreement of generated texts with references: normalised answers, token F1, arithmetic answers, ROUGE, exact match.

Source: specification 6.2. Every per-item function is public, so that evaluations can report standard errors.
"""

import logging
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache

from common.errors import DataError

ANSWER_MARK = "####"
ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case without punctuation, without the words a, an, the, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, references: str | Sequence[str]) -> float:
    """Largest F1 over the references, of the multisets of normalised words; 0 without a common word."""
    references = [references] if isinstance(references, str) else references
    return max((_f1(prediction, reference) for reference in references), default=0.0)


def _f1(prediction: str, reference: str) -> float:
    words, wanted = normalize_answer(prediction).split(), normalize_answer(reference).split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def contains_answer(prediction: str, references: Sequence[str]) -> bool:
    """Whether a normalised, non-empty reference occurs in the normalised prediction."""
    text = normalize_answer(prediction)
    return any(answer in text for answer in map(normalize_answer, references) if answer)


def gsm_answer(text: str) -> str:
    """What follows the last ``####``, without commas and outer spaces; the whole text where there is none."""
    return text.split(ANSWER_MARK)[-1].strip().replace(",", "")


def gsm_accuracy(predictions: Sequence[str], labels: Sequence[str]) -> float:
    """Share of predictions whose answer equals the label's as text. Raises: DataError for unequal numbers, or none."""
    _check_pairs(predictions, labels)
    hits = [gsm_answer(text) == gsm_answer(label) for text, label in zip(predictions, labels, strict=True)]
    return sum(hits) / len(hits)


def rouge_each(prediction: str, reference: str) -> dict[str, float]:
    """F-measures of ROUGE-1, 2 and L times 100, and their mean as ``rouge``; no stemming."""
    scores = _scorer().score(reference, prediction)
    values = {kind: 100 * scores[kind].fmeasure for kind in ROUGE_KINDS}
    return values | {"rouge": sum(values.values()) / len(values)}


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means of ``rouge_each`` over pairs. Raises: DataError for unequal numbers, or none."""
    _check_pairs(predictions, references)
    each = [rouge_each(text, reference) for text, reference in zip(predictions, references, strict=True)]
    return {name: sum(values[name] for values in each) / len(each) for name in each[0]}


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not predictions:
        raise DataError(
            f"{len(predictions)} predictions and {len(references)} references; give one reference for each, and some."
        )


@cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, and only this needs it

    logging.getLogger("absl").setLevel(logging.WARNING)  # it announces its tokenizer
    return RougeScorer(list(ROUGE_KINDS), use_stemmer=False)
