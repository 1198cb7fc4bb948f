"""From a golden case's description and inputs to our outputs, by the case's kind, so that new cases run unedited."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from common.checkpoint import load_weights
from common.config import OptimConfig, TrackingConfig
from common.data.detokenizers import DETOKENIZERS
from common.data.packing import pack
from common.diffusion.corruption import mask_bernoulli, mask_count
from common.diffusion.schedules import Geometric, LogLinear, build_schedule
from common.diffusion.time_sampling import decoupled_times, vdm_times
from common.ema import EMA
from common.evaluation.diversity import unigram_entropy
from common.evaluation.generative_perplexity import Scorer, generative_perplexity
from common.evaluation.perplexity import GroupEstimate, combine, estimate_group
from common.testing.golden import fill
from common.tracking import read_records
from common.trainer import fit
from radd.bound import enumerate_bound
from radd.config import NoiseConfig, TrainConfig, TrainingConfig
from radd.losses import SMALLEST_MASK_PROBABILITY, build_order, corrupt, ordered_nll, sequence_losses
from radd.model import RADD, ModelConfig, apply_rotary, rotary_tables
from radd.perplexity import loss_rows, token_nll
from radd.task import RADDTask
from tests.radd import golden_sampling

Arrays = dict[str, Any]
Handler = Callable[[str, Mapping[str, Any], dict[str, Tensor]], Arrays]


def run(name: str, case: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Our outputs for one case, under the names of its ``out_*`` arrays.

    Args:
        name: of the case; its beginning tells the kind.
        case: the entry of ``cases.json`` (or an object whose ``raw`` is that entry).
        arrays: the case's arrays; only ``in_*`` are read, and names of ``out_*`` where they carry parameters.

    Returns:
        Arrays; text cases have no arrays and give what their description calls ``pairs`` or ``blocks``.

    Raises: KeyError for a kind that is not known.
    """
    raw = getattr(case, "raw", case)
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in arrays.items() if key.startswith("in_")}
    names = set(arrays) | set(raw.get("arrays", {}))
    outputs = handler_of(name)(name, {**raw, "output_names": sorted(n for n in names if n.startswith("out_"))}, tensors)
    return {key: value.detach().cpu().numpy() if isinstance(value, Tensor) else value for key, value in outputs.items()}


def handler_of(name: str) -> Handler:
    """The handler with the longest matching beginning."""
    matches = [prefix for prefix in HANDLERS if name.startswith(prefix)]
    if not matches:
        raise KeyError(f"golden case {name!r} is of no known kind: {', '.join(HANDLERS)}")
    return HANDLERS[max(matches, key=len)]


def build_model(config: Mapping[str, Any]) -> RADD:
    """The case's network with the deterministic weights, in eval mode and float32."""
    proportions = dict(config["model"])
    tokens = proportions.pop("tokens")
    model = RADD(ModelConfig.from_mapping({"dropout": 0.0, **proportions}), tokens)
    return fill(model, config["weights_seed"], skip=("rotary_emb.inv_freq",)).eval()


def denoiser(model: RADD) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda tokens, where: model(tokens, where=where)


# ---------------------------------------------------------------- schedules and corruption


def noise(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    config = case["config"]
    schedule = Geometric(config["sigma_min"], config["sigma_max"]) if "sigma_min" in config else LogLinear(**config)
    t = inputs["in_t"]
    return {
        "out_sigma": schedule.sigma(t),
        "out_dsigma": schedule.dsigma(t),
        "out_mask_prob": schedule.mask_probability(t),
    }


def time_samplers(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    eps = case["config"]["sampling_eps"]
    vdm = vdm_times(inputs["in_u0"], len(inputs["in_u"]))
    return {"out_vdm": vdm, "out_decoupled": decoupled_times(inputs["in_u"]), "out_t": (1 - eps) * vdm + eps}


def corruption(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    x, mask_id = inputs["in_x0"], case["config"]["mask_id"]
    return {
        "out_z_t": mask_bernoulli(x, -torch.expm1(-inputs["in_sigma"]), inputs["in_u"], mask_id),
        "out_z_lambda": mask_bernoulli(x, inputs["in_lambda"], inputs["in_u"], mask_id),
        "out_z_k": mask_count(x, inputs["in_k"], inputs["in_perm"], mask_id),
    }


# ---------------------------------------------------------------- network


def rotary(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    width, base = case["config"]["head_dim"], case["config"]["base"]
    qkv = inputs["in_qkv"]
    cos, sin = rotary_tables(qkv.shape[1], 1.0 / base ** (torch.arange(0, width, 2).float() / width))
    q, k, v = qkv.unbind(dim=2)
    turned = torch.stack([apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v], dim=2)
    return {"out_cos": cos, "out_sin": sin, "out_qkv": turned}


def model_forward(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    model = build_model(case["config"])
    return {"out_log_probs": model(inputs["in_x"]), "out_logits": model.logits(inputs["in_x"])}


# ---------------------------------------------------------------- losses


def loss_draws(loss_type: str, inputs: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The case's random numbers under the names of ``draw_loss_inputs``."""
    if loss_type == "k_DCE":
        return {"k": inputs["in_k"], "perm": inputs["in_perm"]}
    if loss_type == "lambda_DCE":
        # u = 0 would be a division by zero in the reference; ours keeps lambda positive.
        level = decoupled_times(inputs["in_u_lambda"]).clamp(min=SMALLEST_MASK_PROBABILITY)
        return {"lambda": level, "u_mask": inputs["in_u_mask"]}
    return {"time": vdm_times(inputs["in_u0"], rows), "u_mask": inputs["in_u_mask"]}


def loss(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    config, x = case["config"], inputs["in_x0"]
    model, loss_type = build_model(config), config["loss_type"]
    noise_config = config["noise"] if isinstance(config["noise"], Mapping) else {"type": config["noise"]}
    schedule = build_schedule(**noise_config)
    eps = config.get("sampling_eps") or 1e-3
    draws = loss_draws(loss_type, inputs, len(x))
    state = corrupt(loss_type, x, draws, schedule, mask_id=model.mask_id, sampling_eps=eps)
    loss_B = sequence_losses(state, model(state.z_BL, x, state.where_BL))
    gradients = torch.autograd.grad(loss_B.mean(), list(model.parameters()))
    outputs = {
        "out_z": state.z_BL,
        "out_loss": loss_B,
        "out_grad_norm": torch.stack([gradient.norm() for gradient in gradients]),
        "out_log_probs": model(state.z_BL),
    }
    if "time" in draws:
        t = (1 - eps) * draws["time"] + eps
        outputs |= {"out_t": t, "out_sigma": schedule.sigma(t), "out_dsigma": schedule.dsigma(t)}
    if "lambda" in draws:
        outputs["out_lambda"] = draws["lambda"]
    return outputs


def loss_ordered(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    model, x = build_model(case["config"]), inputs["in_x0"]

    def nll(order: Tensor) -> Tensor:
        return ordered_nll(denoiser(model), x, order, mask_id=model.mask_id)

    return {
        "out_forward": nll(build_order("ar_forward", *x.shape)),
        "out_backward": nll(build_order("ar_backward", *x.shape)),
        "out_order": nll(inputs["in_order"]),
    }


def exact_bound(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    model = build_model(case["config"])
    bound = enumerate_bound(denoiser(model), inputs["in_x0"][0], mask_id=model.mask_id)
    eps = case["config"]["sampling_eps"]
    return {
        "out_ao": np.float64(bound.ao),
        "out_order_nll": bound.all_order_nll(),
        "out_S": bound.mean_nll_k,
        "out_t_dse": np.float64(bound.t_dse(eps)),
        "out_t_dce": np.float64(bound.t_dce(eps)),
    }


# ---------------------------------------------------------------- engine


def ema(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    parameter = inputs["in_init"].clone()
    average = EMA({"parameter": parameter}, case["config"]["decay"])
    shadows = []
    for value in inputs["in_values"]:
        parameter.copy_(value)
        average.update()
        shadows.append(average.state_dict()["shadow"]["parameter"].clone())
    return {"out_shadow": torch.stack(shadows)}


class FrozenTask(RADDTask):
    """RADD's task with the case's weights and random numbers."""

    def __init__(self, config: TrainConfig, weights_seed: int, draws: Callable[[int], dict[str, Tensor]]) -> None:
        super().__init__(config)
        self.weights_seed, self.draws = weights_seed, draws

    def build_model(self) -> RADD:
        return fill(super().build_model(), self.weights_seed, skip=("rotary_emb.inv_freq",))

    def draw(self, step: int, size: int) -> dict[str, Tensor]:
        return self.draws(step)


class FrozenLoader:
    """The case's micro-batches in order."""

    def __init__(self, batches: Tensor) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter({"tokens": batch_BL} for batch_BL in self.batches)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        raise NotImplementedError("a golden run starts once")

    def seek(self, step: int) -> None:
        raise NotImplementedError("a golden run starts once")


def train_steps(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    """The case's optimizer steps on the real engine, with metrics and weights read from its run folder."""
    config, batches = case["config"], inputs["in_x0"]
    accum, (micro_batches, rows, _) = config["accum"], batches.shape
    steps = micro_batches // accum
    proportions = {"dropout": 0.0, **config["model"]}
    eps = config.get("sampling_eps") or 1e-3

    def draws(step: int) -> dict[str, Tensor]:
        """Time strata per micro-batch, as the reference draws them."""
        parts = []
        for index in range(step * accum, (step + 1) * accum):
            mine = {key: array[index] for key, array in inputs.items()}
            parts.append(loss_draws(config["loss_type"], mine, rows))
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    with tempfile.TemporaryDirectory() as run_dir:
        train = TrainConfig(
            run_dir=run_dir,
            tokens=proportions["tokens"],
            precision="fp32",
            model=ModelConfig.from_mapping(proportions),
            optim=OptimConfig(**config["optimizer"]),
            noise=NoiseConfig(type=config.get("noise", "loglinear")),
            tracking=TrackingConfig(progress=False),
            training=TrainingConfig(
                batch_size=accum * rows,
                accum=accum,
                n_iters=steps,
                log_freq=1,
                eval_freq=0,
                ema=config["ema"],
                loss_type=config["loss_type"],
                loss_norm="sequences",
                sampling_eps=eps,
            ),
        )
        task = FrozenTask(train, config["weights_seed"], draws)
        fit(task, train.trainer_config(1), train_loader=FrozenLoader(batches))
        records = read_records(Path(run_dir))
        final, average = (load_weights(run_dir, ema=wanted)[0] for wanted in (False, True))
    start = dict(task.build_model().named_parameters())
    return {
        "out_logged": np.array([record["train/loss"] for record in records]),
        "out_lr": np.array([record["train/lr"] for record in records]),
        "out_param_norm": torch.stack([final[key].norm() for key in start]),
        "out_delta_norm": torch.stack([(final[key] - start[key]).norm() for key in start]),
        "out_ema_norm": torch.stack([average[key].norm() for key in start]),
        "out_final_bias": final["output_layer.linear.bias"],
    }


# ---------------------------------------------------------------- evaluation


def ppl_estimator(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    """The evaluation's estimators with the case's draws; losses are those that the outputs name."""
    config, batches = case["config"], inputs["in_x0"]
    model = build_model(config)
    noise_config = config.get("noise", "loglinear")
    schedule = build_schedule(**(noise_config if isinstance(noise_config, Mapping) else {"type": noise_config}))
    eps = config.get("sampling_eps") or 1e-3
    outputs: Arrays = {}
    for loss_type in (key.removeprefix("out_nll_") for key in case["output_names"] if key.startswith("out_nll_")):
        groups = []
        for index, x_BL in enumerate(batches):
            replicates = []
            for draw in range(config["monte_carlo_timesteps"]):
                mine = {key: array[index, draw] for key, array in inputs.items() if key != "in_x0"}
                draws = loss_draws(loss_type, mine, len(x_BL))
                replicates.append(loss_rows(loss_type, x_BL, draws, schedule, sampling_eps=eps))
            values = estimate_group(token_nll(model), x_BL, replicates, mask_id=model.mask_id, batch_size=4)
            groups.append(GroupEstimate.from_values(*values))
        bound = combine(groups, batches.shape[-1])
        outputs[f"out_nll_{loss_type}"] = np.float64(bound.nats_per_token.value * batches.shape[-1])
        outputs[f"out_ppl_{loss_type}"] = np.float64(bound.perplexity.value)
    return outputs


def gpt2_perplexity(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    config = case["config"]
    model = GPT2LMHeadModel(GPT2Config(**config["gpt2"], bos_token_id=0, eos_token_id=0)).eval()
    fill(model.transformer, config["weights_seed"])
    model.tie_weights()
    scorer = Scorer(model, "frozen", config["gpt2"]["vocab_size"], config["gpt2"]["n_positions"])
    scores = generative_perplexity(scorer, list(inputs["in_x"]), batch_size=config["batch"])
    metrics = {metric.name: np.float64(metric.value) for metric in scores.metrics()}
    return {
        "out_seq_nll": np.array(scores.nll) / np.array(scores.count),
        "out_ppl": metrics["perplexity"],
        "out_ppl_pooled": metrics["perplexity_pooled"],
        "out_entropy": np.array([unigram_entropy(row) for row in inputs["in_x"].tolist()]),
    }


# ---------------------------------------------------------------- text


def detokenizers(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    """``pairs``: kind -> [[text, our text], ...]."""
    return {
        "pairs": {
            kind: [[text, DETOKENIZERS[kind](text)] for text, _ in pairs] for kind, pairs in case["pairs"].items()
        }
    }


def packing(name: str, case: Mapping[str, Any], inputs: dict[str, Tensor]) -> Arrays:
    documents = [[ord(character) - 32 for character in document] for document in case["documents"]]
    blocks, _ = pack(documents, case["block_size"], case["eos"])
    return {"blocks": blocks.tolist()}


HANDLERS: dict[str, Handler] = {
    "noise_": noise,
    "time_samplers": time_samplers,
    "corrupt": corruption,
    "rotary": rotary,
    "model_forward": model_forward,
    "loss_": loss,
    "loss_ordered": loss_ordered,
    "exact_bound": exact_bound,
    "ema": ema,
    "train_steps": train_steps,
    "ppl_estimator": ppl_estimator,
    "generative_perplexity": gpt2_perplexity,
    "detokenizers": detokenizers,
    "packing": packing,
    **golden_sampling.HANDLERS,
}
