"""Networks that a generator must be compared with: noise-perturbed originals, their mean, interpolations, regressions.

Generated networks that are no better than these have learned nothing about the distribution of weights: compare Zeng
et al. 2025, "Generative modeling of weights: generalization or memorization?".

A state dict's VARYING entries are floating-point tensors of more than one element whose name does not contain
``num_batches_tracked``; all others are carried over from the first checkpoint.

Dimensions: K checkpoints, C numbers of a condition, F features of a regression, V values of a network.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from common.errors import ConfigError, DataError

State = dict[str, Tensor]
LOG_OFFSET, VARIANCE_SHARE, SMALLEST_SHARE = 0.05, 0.95, 0.001
"""Of the transform of running variances: ``v = ln(w / q + 0.05)`` with ``q = 0.95 mean(w)``; back, at least 0.001 q."""
NOISE_LEVELS = (0.01, 0.02, 0.03, 0.04, 0.05)


def is_varying(name: str, tensor: Tensor) -> bool:
    """Whether a generator models this entry of a state dict."""
    return tensor.is_floating_point() and tensor.numel() > 1 and "num_batches_tracked" not in name


def perturb(
    state: Mapping[str, Tensor],
    intensity: float,
    generator: torch.Generator | None = None,
    *,
    noise: Mapping[str, Tensor] | None = None,
) -> State:
    """The network with Gaussian noise added to every varying tensor, in units of the tensor's own deviation.

    Running variances are perturbed in log space, where they stay positive. Constant tensors have deviation 0 and stay
    as they are; a tensor that stands under several names stays tied.

    Args:
        state: one checkpoint; not changed.
        intensity: standard deviation of the noise over the (unbiased) one of the tensor's values; 0.01 to 0.05 are the
            levels of the paper's novelty study.
        generator: where the noise comes from.
        noise: standard normal values by name, instead.

    Source: the control group of the RPG paper's evaluation script.
    """
    found: State = {}
    done: dict[tuple, str] = {}
    for name, tensor in state.items():
        if not is_varying(name, tensor):
            found[name] = tensor.clone()
            continue
        storage = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if storage in done:
            found[name] = found[done[storage]]
            continue
        done[storage] = name
        value = tensor.float()
        eps = torch.randn(tensor.shape, generator=generator) if noise is None else noise[name].float()
        found[name] = _perturb(name, value, intensity * eps.to(value.device)).to(tensor.dtype)
    return found


def _perturb(name: str, value: Tensor, noise: Tensor) -> Tensor:
    """One tensor in float32 plus ``noise`` of its deviations."""
    if "running_var" not in name:
        return value + noise * value.std()
    scale = VARIANCE_SHARE * value.mean()
    if not scale > 0:  # all zero: nothing to take the logarithm of
        return value.clone()
    logs = (value / scale + LOG_OFFSET).log()
    return ((logs + noise * logs.std()).exp() - LOG_OFFSET).clamp(min=SMALLEST_SHARE) * scale


def mean_state(states: Iterable[Mapping[str, Tensor]]) -> State:
    """The average network: means of all floating-point entries, the rest from the first checkpoint.

    Reads the checkpoints one after another and sums in float64. With BatchNorm the averaged running statistics are used
    as they are, not measured anew.

    Raises: DataError if there is no checkpoint.
    """
    sums: State = {}
    first: Mapping[str, Tensor] = {}
    count = 0
    for state in states:
        if not count:
            first = {name: tensor.clone() for name, tensor in state.items()}
            sums = {name: tensor.double() for name, tensor in first.items() if tensor.is_floating_point()}
        else:
            for name, total in sums.items():
                total += state[name].double()  # in place
        count += 1
    if not count:
        raise DataError("there is no checkpoint to take the mean of; give a folder with checkpoints.")
    return {name: (sums[name] / count).to(tensor.dtype) if name in sums else tensor for name, tensor in first.items()}


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], weight: float) -> State:
    """``(1 - weight) first + weight second`` of all floating-point entries, the rest from ``first``."""
    return {
        name: torch.lerp(tensor.double(), second[name].double(), weight).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in first.items()
    }


def random_pairs(num_checkpoints: int, count: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """``count`` pairs of different checkpoints, each drawn uniformly.

    Raises: DataError for fewer than two checkpoints.
    """
    if num_checkpoints < 2:
        raise DataError(f"interpolation needs two checkpoints, there is {num_checkpoints}; give more or leave it out.")
    first_R = torch.randint(num_checkpoints, (count,), generator=generator)
    step_R = torch.randint(1, num_checkpoints, (count,), generator=generator)
    return list(zip(first_R.tolist(), ((first_R + step_R) % num_checkpoints).tolist(), strict=True))


def interpolations(
    states: Sequence[Mapping[str, Tensor]], count: int, generator: torch.Generator, *, weight: float = 0.5
) -> Iterator[State]:
    """Networks between random pairs of checkpoints."""
    for one, other in random_pairs(len(states), count, generator):
        yield interpolate(states[one], states[other], weight)


class RidgeRegression:
    """Weights as a linear function of a condition: the baseline of conditional generation.

    Minimises ``sum_k ||w_k - b - x_k^T A||^2 + penalty ||A||^2`` over the intercept ``b`` (free of the penalty) and
    ``A``, for every weight on its own. With binary conditions and ``products`` it knows which pairs of classes stand
    on one side.

    Args:
        conditions_KC: one row per checkpoint.
        states: the checkpoints, in the same order; read once, one at a time.
        products: whether products of all pairs of a condition's numbers are features too.
        penalty: relative to conditions of size 1.

    Raises: ConfigError for a penalty below 0; DataError if conditions and checkpoints differ in number.
    """

    def __init__(
        self,
        conditions_KC: Tensor,
        states: Iterable[Mapping[str, Tensor]],
        *,
        products: bool = False,
        penalty: float = 1.0,
    ) -> None:
        if not penalty >= 0:
            raise ConfigError(f"penalty={penalty} must be at least 0.")
        self.products = products
        self._first: Mapping[str, Tensor] = {}
        features_KF = self.features(conditions_KC)
        self._mean_F = features_KF.mean(0)
        centred_KF = features_KF - self._mean_F
        targets_FV: dict[str, Tensor] = {}
        means_V: State = {}
        count = 0
        for state in states:
            if count >= len(centred_KF):
                raise DataError(f"there are {len(centred_KF)} conditions, but more checkpoints; give one for each.")
            if not count:
                self._first = {name: tensor.clone() for name, tensor in state.items()}
            for name, tensor in state.items():
                if not is_varying(name, tensor):
                    continue
                value_V = tensor.double().flatten()
                if not count:
                    targets_FV[name] = torch.zeros(centred_KF.shape[1], len(value_V), dtype=torch.float64)
                    means_V[name] = torch.zeros_like(value_V)
                targets_FV[name].addr_(centred_KF[count], value_V)
                means_V[name] += value_V
            count += 1
        if count != len(centred_KF) or not count:
            raise DataError(f"there are {len(centred_KF)} conditions, but {count} checkpoints; give one for each.")
        gram_FF = centred_KF.T @ centred_KF + penalty * torch.eye(centred_KF.shape[1], dtype=torch.float64)
        # features that never vary make the matrix singular when there is no penalty
        inverse_FF = torch.linalg.pinv(gram_FF, hermitian=True)
        self._weights = {name: inverse_FF @ target_FV for name, target_FV in targets_FV.items()}
        self._means = {name: total_V / count for name, total_V in means_V.items()}

    def features(self, conditions_KC: Tensor) -> Tensor:
        """(K, F) float64: the condition's numbers, then products of pairs."""
        condition_KC = torch.as_tensor(conditions_KC, dtype=torch.float64)
        if not self.products:
            return condition_KC
        one, other = torch.triu_indices(condition_KC.shape[1], condition_KC.shape[1], offset=1)
        return torch.cat([condition_KC, condition_KC[:, one] * condition_KC[:, other]], dim=1)

    def predict(self, condition_C: Sequence[float] | Tensor) -> State:
        """The network for one condition; entries that do not vary are the first checkpoint's."""
        condition_1C = torch.as_tensor(condition_C, dtype=torch.float64).reshape(1, -1)
        offset_F = self.features(condition_1C)[0] - self._mean_F
        found: State = {}
        for name, tensor in self._first.items():
            if name in self._weights:
                value_V = self._means[name] + offset_F @ self._weights[name]
                found[name] = value_V.reshape(tensor.shape).to(tensor.dtype)
            else:
                found[name] = tensor.clone()
        return found
