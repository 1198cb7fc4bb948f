"""Golden cases of the evaluation: intersection over union of errors, noise-perturbed checkpoints."""

from collections.abc import Mapping

from torch import Tensor

from rpg.baselines import perturb
from rpg.novelty import compute_novelty, wrong_predictions

Arrays = Mapping[str, Tensor]


def _iou(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    wrong_KN = wrong_predictions(x["in_predictions"], x["in_targets"])
    originals = config["num_original"]
    novelty = compute_novelty(
        {"original": wrong_KN[:originals], "generated": wrong_KN[originals : originals + config["num_generated"]]}
    )
    original, generated = novelty.groups["original"], novelty.groups["generated"]
    return {
        "out_iou_matrix": novelty.iou_KK,
        "out_origin_origin": original.within.value,
        "out_generated_generated": generated.within.value,
        "out_origin_generated": generated.with_originals.value,
        "out_origin_generated_max": generated.similarity_K,
        "out_origin_generated_max_mean": generated.similarity.value,
        "out_origin_origin_max": original.similarity_K,
        "out_accuracy": [*original.accuracy_K.tolist(), *generated.accuracy_K.tolist()],
    }


def _noise(case: Mapping, config: Mapping, x: Arrays) -> dict[str, object]:
    state = {name.removeprefix("in_sd/"): value for name, value in x.items() if name.startswith("in_sd/")}
    noise = {name.removeprefix("in_eps/"): value for name, value in x.items() if name.startswith("in_eps/")}
    found = perturb(state, config["noise_intensity"], noise=noise)
    return {f"out_sd/{name}": value for name, value in found.items()}


KINDS = [
    (lambda case, config, x: "num_generated" in config and "in_predictions" in x, _iou),
    (lambda case, config, x: "noise_intensity" in config, _noise),
]
