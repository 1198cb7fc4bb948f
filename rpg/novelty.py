"""How alike networks err: intersection over union (IoU) of the test samples that they misclassify.

Two networks with the same weights err on the same samples (IoU 1); independent trainings of one architecture share the
hard ones only. A useful generator lies above the curve of noise-perturbed originals: more accurate at equal IoU.

Two networks without any error have no union; their IoU is 0 here, also on the diagonal, so that no NaN enters a mean.

Dimensions: K networks, N test samples; A, B networks of two groups.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.errors import DataError
from common.evaluation.metric import Metric, mean_metric

ORIGINAL, GENERATED = "original", "generated"


def wrong_predictions(predictions_KN: Tensor, targets_N: Tensor) -> Tensor:
    """(K, N) bool: where each network errs.

    Raises: DataError if the numbers of predictions and targets differ.
    """
    if predictions_KN.ndim != 2 or predictions_KN.shape[1:] != targets_N.shape:
        raise DataError(
            f"predictions of shape {tuple(predictions_KN.shape)} do not fit targets of shape "
            f"{tuple(targets_N.shape)}; all networks must be tested on the same samples, one row each."
        )
    return predictions_KN != targets_N


def iou_matrix(wrong_AN: Tensor, wrong_BN: Tensor | None = None) -> Tensor:
    """(A, B) float64: samples that both get wrong over samples that at least one gets wrong; 0 if there is none.

    Args:
        wrong_AN: bool, see ``wrong_predictions``.
        wrong_BN: the other group; None: the same one.

    Source: the novelty metric of the RPG paper's evaluation script; 0 instead of 0/0 is ours.
    """
    wrong_BN = wrong_AN if wrong_BN is None else wrong_BN
    # counts below 2^24 are exact in float32, which multiplies faster than float64
    kind = torch.float32 if wrong_AN.shape[-1] < 2**24 else torch.float64
    both_AB = (wrong_AN.to(kind) @ wrong_BN.to(kind).T).double()
    either_AB = wrong_AN.sum(1).double()[:, None] + wrong_BN.sum(1).double()[None] - both_AB
    return torch.where(either_AB > 0, both_AB / either_AB.clamp(min=1), 0.0)


def off_diagonal_mean(iou_KK: Tensor) -> float | None:
    """Mean over pairs of different networks; None for fewer than two."""
    count = len(iou_KK)
    return None if count < 2 else float((iou_KK.sum() - iou_KK.diagonal().sum()) / (count * (count - 1)))


def pairwise_metric(name: str, iou_KK: Tensor) -> Metric | None:
    """Mean over pairs of different networks with its jackknife error over networks; None for fewer than two.

    Pairs that share a network are dependent, so leaving out one network at a time gives the error, not the pairs'
    spread; with two networks there is one pair and no error.
    """
    mean, count = off_diagonal_mean(iou_KK), len(iou_KK)
    if mean is None:
        return None
    if count < 3:
        return Metric(name, mean)
    pairs_K = iou_KK.sum(1) + iou_KK.sum(0) - 2 * iou_KK.diagonal()  # sums of the pairs, both ways, of each network
    total = mean * count * (count - 1)
    left_out_K = (total - pairs_K) / ((count - 1) * (count - 2))
    variance = (count - 1) / count * ((left_out_K - left_out_K.mean()) ** 2).sum()
    return Metric(name, mean, math.sqrt(float(variance)))


def largest_iou(iou_AB: Tensor, *, same_group: bool = False) -> Tensor | None:
    """(A,) IoU of every network with the one of the other group that is most like it; None if there is none.

    Args:
        same_group: rows and columns are the same networks, and a network is not compared with itself.
    """
    if iou_AB.shape[1] - same_group < 1:
        return None
    if same_group:
        iou_AB = iou_AB.masked_fill(torch.eye(len(iou_AB), dtype=torch.bool, device=iou_AB.device), -1.0)
    return iou_AB.max(1).values


@dataclass(frozen=True)
class GroupSummary:
    """What is reported about one group of networks; errors are over networks, for the same test samples.

    Attributes:
        accuracy_K, similarity_K: of every network; ``similarity`` is its largest IoU with an original (of an original:
            with another one), None without originals to compare with.
        within: mean IoU of its pairs; None for one network.
        with_originals: mean IoU of all pairs with originals; None for the originals themselves.
        notes: what is missing, and why.
    """

    name: str
    accuracy_K: Tensor
    accuracy: Metric
    within: Metric | None
    with_originals: Metric | None
    similarity_K: Tensor | None
    similarity: Metric | None
    notes: tuple[str, ...] = ()

    @property
    def lowest(self) -> float:
        return float(self.accuracy_K.min())

    @property
    def highest(self) -> float:
        return float(self.accuracy_K.max())


@dataclass(frozen=True)
class Novelty:
    """IoU of all networks, in the order of ``names``, and a summary per group."""

    iou_KK: Tensor
    names: tuple[str, ...]
    groups: Mapping[str, GroupSummary] = field(default_factory=dict)


def compute_novelty(
    wrong: Mapping[str, Tensor], *, original: str = ORIGINAL, names: Mapping[str, Sequence[str]] | None = None
) -> Novelty:
    """Summaries of groups of networks that were tested on the same samples.

    Args:
        wrong: group -> (K, N) bool, see ``wrong_predictions``; groups without a network are left out.
        original: the group that others are compared with; it may be absent.
        names: group -> names of its networks; None: ``group/0`` and so on.

    Raises: DataError if groups were tested on different numbers of samples, or nothing was tested.
    """
    wrong = {group: wrong_KN for group, wrong_KN in wrong.items() if len(wrong_KN)}
    lengths = {group: wrong_KN.shape[1] for group, wrong_KN in wrong.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(
            f"numbers of test samples by group are {lengths}; errors can be compared on the same samples only, of "
            "which there must be some."
        )
    iou_KK = iou_matrix(torch.cat(list(wrong.values())))
    first, places = 0, {}
    for group, wrong_KN in wrong.items():
        places[group] = slice(first, first := first + len(wrong_KN))
    summaries = {
        group: _summary(group, wrong_KN, iou_KK[places[group]], places, original) for group, wrong_KN in wrong.items()
    }
    every_name = tuple(
        str(name)
        for group, wrong_KN in wrong.items()
        for name in ((names or {}).get(group) or [f"{group}/{place}" for place in range(len(wrong_KN))])
    )
    return Novelty(iou_KK, every_name, summaries)


def summarize_accuracy(group: str, accuracy_K: Tensor, *, similarity_K: Tensor | None = None) -> GroupSummary:
    """A summary of networks whose errors are not compared, or compared elsewhere (``similarity_K``)."""
    return GroupSummary(
        name=group,
        accuracy_K=accuracy_K,
        accuracy=mean_metric("accuracy", accuracy_K),
        within=None,
        with_originals=None,
        similarity_K=similarity_K,
        similarity=None if similarity_K is None else mean_metric("iou_nearest_original", similarity_K),
        notes=("one network: no standard errors",) if len(accuracy_K) == 1 else (),
    )


def _summary(group: str, wrong_KN: Tensor, rows_KA: Tensor, places: Mapping[str, slice], original: str) -> GroupSummary:
    """Of one group, from its rows of the whole matrix."""
    accuracy_K = 1 - wrong_KN.double().mean(1)
    notes = []
    within = pairwise_metric("iou_within", rows_KA[:, places[group]])
    if within is None:
        notes.append("one network: no pairs and no standard errors")
    similarity_K = with_originals = None
    if original in places:
        is_original = group == original
        with_KO = rows_KA[:, places[original]]
        similarity_K = largest_iou(with_KO, same_group=is_original)
        if not is_original:
            with_originals = mean_metric("iou_with_originals", with_KO.mean(1))
    else:
        notes.append("no originals to compare with")
    return GroupSummary(
        name=group,
        accuracy_K=accuracy_K,
        accuracy=mean_metric("accuracy", accuracy_K),
        within=within,
        with_originals=with_originals,
        similarity_K=similarity_K,
        similarity=None if similarity_K is None else mean_metric("iou_nearest_original", similarity_K),
        notes=tuple(notes),
    )
