"""Golden cases of metrics, captions and GenEval; see ``golden_adapter``."""

import re
from collections.abc import Mapping

import numpy as np

from mup_dit import aspect_ratios
from mup_dit.captions import clean_caption, parse_prompt
from mup_dit.geneval.decision import decide
from mup_dit.geneval.detection import Detection
from mup_dit.geneval.geometry import intersection_over_union, relative_positions
from mup_dit.geneval.summary import Outcome, summarize
from mup_dit.metrics.frechet import frechet_distance
from mup_dit.metrics.inception_score import ScoreAccumulator
from mup_dit.metrics.moments import compute_moments
from mup_dit.metrics.precision_recall import precision_recall, radii


def _metrics(case: Mapping, config: Mapping, x: Mapping) -> dict[str, object]:
    sample, reference, k = x["in_feat_sample"], x["in_feat_ref"], config["k"]
    moments = {name: compute_moments(values.numpy()) for name, values in x.items()}
    score = ScoreAccumulator(config["inception_split_size"])
    score.update((sample @ x["in_softmax_weight"]).numpy(), range(len(sample)))
    outputs: dict[str, object] = {
        "out_fid_f64": frechet_distance(moments["in_feat_sample"], moments["in_feat_ref"]),
        "out_sfid_f64": frechet_distance(moments["in_spatial_sample"], moments["in_spatial_ref"]),
        "out_is_f64": score.finish().value,
        "out_fid_rank_deficient_f64": frechet_distance(moments["in_few"], moments["in_feat_ref"]),
        "out_radii_ref": radii(reference, k=k, half_precision=True)[:, None],
        "out_radii_sample": radii(sample, k=k, half_precision=True)[:, None],
        "out_radii_ref_x300": radii(300 * reference, k=k)[:, None],
    }
    for suffix, factor, half in (("", 1, True), ("_x300", 300, False)):
        shares = precision_recall(factor * sample, factor * reference, k=k, half_precision=half)
        outputs[f"out_precision{suffix}_f64"] = shares.precision.value
        outputs[f"out_recall{suffix}_f64"] = shares.recall.value
    return outputs


def _captions(case: Mapping, config: Mapping, x: Mapping) -> dict[str, object]:
    return {"cases": [{"cleaned": clean_caption(entry["text"])} for entry in case["cases"]]}


def _tables(case: Mapping, config: Mapping, x: Mapping) -> dict[str, object]:
    names = [name for name in case if name.startswith("ASPECT_RATIO_")]
    return {
        name: {key: [float(side) for side in sides] for key, sides in getattr(aspect_ratios, name).items()}
        for name in names
    }


def _prompts(case: Mapping, config: Mapping, x: Mapping) -> dict[str, object]:
    size = re.search(r"the (\d+) TEST table", case.get("what", ""))
    table = aspect_ratios.aspect_ratio_table(int(size[1]) if size else 512, test=True)
    found = []
    for entry in case["cases"]:
        prompt = parse_prompt(entry["prompt"], table)
        found.append(
            {
                "clean": prompt.text,
                "hw": [[float(side) for side in prompt.bucket]],
                "ar": [[float(np.float32(prompt.ratio))]],
                "custom_hw": [[float(side) for side in prompt.size]],
            }
        )
    return {"cases": found}


def _geometry(case: Mapping, config: Mapping, x: Mapping) -> dict[str, object]:
    return {
        "cases": [
            {
                "relations": sorted(relative_positions(entry["a"], entry["b"], config["position_threshold"])),
                "iou": intersection_over_union(entry["a"], entry["b"]),
            }
            for entry in case["cases"]
        ]
    }


def _decisions(case: Mapping, config: Mapping, x: Mapping) -> dict[str, object]:
    colours: dict[tuple, str] = {}
    detections: dict[str, list[Detection]] = {}
    for name, entries in case["detections"].items():
        for entry in entries:
            *box, score = entry["box"]
            detections.setdefault(name, []).append(Detection(tuple(box), score))
            colours[tuple(box)] = entry["colour"]

    def classify(found: list[Detection], name: str) -> list[str]:
        return [colours[detection.box] for detection in found]

    return {"cases": [{"correct": decide(entry["metadata"], detections, classify).correct} for entry in case["cases"]]}


def _summary(case: Mapping, config: Mapping, x: Mapping) -> dict[str, object]:
    rows = [Outcome(row["tag"], row["prompt"], row["correct"]) for row in case["rows"]]
    return {"printed": summarize(rows).text()}


def _entries(case: Mapping) -> Mapping:
    cases = case.get("cases") or [{}]
    return cases[0]


KINDS = [
    (lambda case, config, x: "in_softmax_weight" in x, _metrics),
    (lambda case, config, x: "cleaned" in _entries(case), _captions),
    (lambda case, config, x: any(name.startswith("ASPECT_RATIO_") for name in case), _tables),
    (lambda case, config, x: "custom_hw" in _entries(case), _prompts),
    (lambda case, config, x: "iou" in _entries(case), _geometry),
    (lambda case, config, x: "detections" in case and "metadata" in _entries(case), _decisions),
    (lambda case, config, x: "printed" in case and "rows" in case, _summary),
]
