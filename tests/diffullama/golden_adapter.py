"""Golden cases of the adapted models through the public functions; dispatches on what a case holds, not on its name."""

import tempfile
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from common.testing.golden import fill_values
from diffullama.attention import anneal_ratio, annealed_allowed, to_additive
from diffullama.filters import lowest_k, top_p_filter
from diffullama.losses import diffusion_loss
from diffullama.metrics import gsm_accuracy, normalize_answer, token_f1
from diffullama.model import DiffusionLM
from diffullama.noise import add_noise, add_noise_discrete, sample_time
from diffullama.packed import PackedReader, PackedWriter, open_packed
from diffullama.reference_samplers import sample
from diffullama.scoring import choice_scores, level_masks
from diffullama.sft import pack, sft_example
from diffullama.special_tokens import noisy_mean_rows

CONFIGS = {"gpt2": (GPT2Config, GPT2LMHeadModel), "llama": (LlamaConfig, LlamaForCausalLM)}
DROPOUTS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def run(name: str, case: Mapping, arrays: Mapping[str, np.ndarray], implementation: str = "sdpa") -> dict[str, object]:
    """Everything this repository computes for a case; names of outputs are those of the case's arrays."""
    inputs = {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}
    held = {*inputs, *case.get("inputs", {})}  # cases of text keep their inputs in the description
    for kind, compute in KINDS.items():
        if set(kind) <= held:
            return compute(case, inputs, implementation)
    raise KeyError(f"{name}: no rule for a case with inputs {sorted(held)}")


def build_model(case: Mapping, implementation: str) -> DiffusionLM:
    """The case's tiny network with its deterministic weights, through the loader of released checkpoints."""
    config_class, model_class = CONFIGS[case["family"]]
    options = {key: value for key, value in case["config"].items() if key != "dropout"}
    options |= {"bos_token_id": None, "eos_token_id": None}
    if case["family"] == "gpt2":
        options |= DROPOUTS
    config = config_class(**options, attn_implementation=implementation)
    model = DiffusionLM.from_causal_lm(model_class(config), case.get("mask_token_id", 0), case.get("shift", True))
    state = {key: torch.from_numpy(fill_values(key, tuple(shape), case["weights_seed"])).float()
             for key, shape in case["state_dict"]}  # fmt: skip
    model.load_reference_state_dict(state)
    return model.eval()


def _anneal(case: Mapping, x: dict[str, Tensor], _: str) -> dict[str, object]:
    allowed = torch.stack([annealed_allowed(x["in_u"], ratio) for ratio in x["in_ratio"]])
    ratios = [anneal_ratio(int(s), int(n)) for s, n in zip(x["in_global_step"], x["in_anneal_steps"], strict=True)]
    return {
        "out_allowed": allowed.long(),
        "out_additive_mask": to_additive(allowed),
        "out_ratio_of_step": np.array(ratios, dtype=np.float32),
    }


def _noise(case: Mapping, x: dict[str, Tensor], _: str) -> dict[str, object]:
    mask_id, steps = case["config"]["mask_token_id"], case["config"]["diffusion_steps"]
    t_B = sample_time(x["in_r"])
    x_t, _ = add_noise(x["in_x"], t_B, x["in_u"], mask_id, x["in_src_mask"])
    discrete, drawn = add_noise_discrete(x["in_x"], x["in_t_int"], steps, x["in_u"], mask_id, x["in_src_mask"])
    return {
        "out_t": t_B,
        "out_weight": 1 / t_B,
        "out_x_t": x_t,
        "out_x_t_discrete": discrete,
        "out_discrete_mask": drawn.long(),
    }


def _forward(case: Mapping, x: dict[str, Tensor], implementation: str) -> dict[str, object]:
    model = build_model(case, implementation)
    with torch.no_grad():
        logits = [model(x["in_x"], allowed=annealed_allowed(x["in_ua"], ratio)) for ratio in x["in_ratio"]]
    return {"out_logits": torch.stack(logits)}


def _loss(case: Mapping, x: dict[str, Tensor], implementation: str) -> dict[str, object]:
    model = build_model(case, implementation)
    mask_id, shift = case["mask_token_id"], case["shift"]
    t_B = sample_time(x["in_r"])
    x_t, _ = add_noise(x["in_x"], t_B, x["in_u"], mask_id, x["in_src_mask"])
    allowed = annealed_allowed(x["in_ua"], anneal_ratio(case["global_step"], case["anneal_steps"]))
    logits = model(x_t, allowed=allowed)
    result = diffusion_loss(logits, x["in_x"], x_t, t_B, mask_id, shift)
    per_token = diffusion_loss(logits, x["in_x"], x_t, t_B, mask_id, shift, loss_norm="tokens")
    result.loss.backward()
    reference = {key: value for key, value in model.reference_parameters().items() if value.grad is not None}
    grads = [value.grad for value in reference.values()]
    return {
        "out_x_t": x_t,
        "out_additive_mask": to_additive(allowed),
        "out_logits": logits,
        "out_loss_mask": result.loss_mask.long(),
        "out_ce": result.ce,
        "out_loss": result.loss,
        "out_unweighted_loss": result.unweighted,
        "out_loss_per_token": per_token.loss,
        "out_grad": reference[case["grad_key"]].grad,
        "out_grad_norm": torch.nn.utils.get_total_norm(grads),
    }


def _resize(case: Mapping, x: dict[str, Tensor], _: str) -> dict[str, object]:
    return {"out_new_rows": noisy_mean_rows(x["in_weight"], x["in_noise"])}


def _filters(case: Mapping, x: dict[str, Tensor], _: str) -> dict[str, object]:
    filtered = torch.stack([top_p_filter(x["in_logits"], float(p)) for p in x["in_p"]])
    return {
        "out_logits": filtered,
        "out_kept": (filtered > torch.finfo(filtered.dtype).min).long(),
        "out_lowest_k": lowest_k(x["in_scores"], x["in_k"]).long(),
        "out_lowest_k_stochastic": lowest_k(
            x["in_scores"], x["in_k"], x["in_u"], case["config"]["stochastic_temp"]
        ).long(),
    }


def _decode(case: Mapping, x: dict[str, Tensor], implementation: str) -> dict[str, object]:
    outputs = {}
    for cache in (False, True):
        result = sample(
            build_model(case, implementation),
            x["in_x"],
            x["in_src_mask"],
            case["diffusion_steps"],
            {"random": "random", "topk": "confidence"}[case["sampler"]],
            "greedy" if case["greedy"] else "sample",
            case["logits_temp"],
            case["top_p"],
            case["shift"],
            gumbel=None if case["greedy"] else x["in_gumbel"],
            u=x["in_u"] if x["in_u"].dim() == 3 else None,
            cache=cache,
            score_noise=case.get("stochastic_temp", 0.0),
        )
        assert cache or result.n_calls == case["diffusion_steps"]
        if outputs:
            assert torch.equal(outputs["out_tokens"], result.tokens)
            assert torch.equal(outputs["out_model_inputs"], result.model_inputs)
        outputs = {"out_tokens": result.tokens, "out_model_inputs": result.model_inputs}
    return outputs


def _score(case: Mapping, x: dict[str, Tensor], implementation: str) -> dict[str, object]:
    model, steps = build_model(case, implementation), case["diffusion_steps"]
    outputs, scores = {}, []
    for choice in range(sum(name.startswith("in_x") for name in x)):
        tokens_L, given_L = x[f"in_x{choice}"][0], x[f"in_src_mask{choice}"][0].bool()
        u_TL = x[f"in_u{choice}"][:, 0]
        prefix, continuation = tokens_L[given_L], tokens_L[~given_L]
        scores.append(choice_scores(model, prefix, [continuation], steps, u=[u_TL[:, ~given_L]]))
        masked_TL = torch.zeros(u_TL.shape, dtype=torch.bool)
        masked_TL[:, ~given_L] = level_masks(u_TL[:, ~given_L])
        outputs[f"out_x_t{choice}"] = tokens_L.where(~masked_TL, model.mask_id)[:, None]
    score_C = torch.cat(scores)
    return outputs | {"out_score": score_C, "out_choice": score_C.argmin()[None]}


def _metrics(case: Mapping, _: dict[str, Tensor], __: str) -> dict[str, object]:
    given = case["inputs"]
    each = [token_f1(*pair) for pair in zip(given["predictions"], given["references"], strict=True)]
    return {
        "normalised": [normalize_answer(text) for text in given["predictions"]],
        "f1_each": each,
        "f1": 100 * sum(each) / len(each),
        "gsm_acc": gsm_accuracy(given["gsm_predictions"], given["gsm_labels"]),
    }


def _packed(case: Mapping, x: dict[str, Tensor], _: str) -> dict[str, object]:
    config = case["config"]
    ends = x["in_doc_lengths"].cumsum(0).tolist()
    with tempfile.TemporaryDirectory() as folder:
        options = {"chunk_size": config["chunk_size"], "sep_token": config["sep_token"]}
        with PackedWriter(folder, "train", vocab_size=config["vocab_size"], **options) as writer:
            for start, end in zip([0, *ends], ends, strict=False):
                writer.add(x["in_docs"][start:end])
        assert len(writer.files) == config["n_files"]
        read, length = writer.files[: config["read_files"]], config["block_size"]
        in_order = PackedReader(read, length, n_chunks=config["n_chunks"])
        shuffled = PackedReader(read, length, n_chunks=config["n_chunks"], seed=config["seed"])
        outputs = {
            "out_file0": np.frombuffer(writer.files[0].read_bytes(), dtype=np.uint8),
            "out_file_last": np.frombuffer(writer.files[-1].read_bytes(), dtype=np.uint8),
            "out_blocks": np.stack(list(in_order)).astype(np.int64),
            "out_blocks_shuffled": np.stack(list(shuffled)).astype(np.int64),
        }
        rows = open_packed(read, length)
        assert np.array_equal(rows.fetch(range(len(rows)))["tokens"].numpy(), outputs["out_blocks"])
    return outputs


def _data_prep(case: Mapping, _: dict[str, Tensor], __: str) -> dict[str, object]:
    """Bytes as tokens; the four special ids follow them, and packed documents end in byte 3."""
    given, config = case["inputs"], case["config"]
    special = {"bos": 256, "eos": 257, "sep": 258, "pad": 259}
    examples = [
        sft_example(list(prompt.encode()), list(answer.encode()), **special, cutoff=config["cutoff_len"])
        for prompt, answer in given["sft_pairs"]
    ]
    documents, block = [list(text.encode()) for text in given["texts"]], config["block_size"]
    return {
        "input_ids": [ids for ids, _ in examples],
        "src_mask": [src_mask for _, src_mask in examples],
        "attention_mask": [[1] * len(ids) for ids, _ in examples],  # every position is visible; we keep no mask of ones
        "packed": pack(documents, block, eos=3)[0].tolist(),
        "unpacked": [[*tokens, 3][:block] for tokens in documents],
    }


KINDS: dict[tuple[str, ...], Callable] = {
    ("in_u", "in_ratio", "in_anneal_steps"): _anneal,
    ("in_r", "in_t_int"): _noise,
    ("in_ua", "in_ratio"): _forward,
    ("in_ua", "in_r"): _loss,
    ("in_weight", "in_noise"): _resize,
    ("in_scores", "in_k"): _filters,
    ("in_gumbel", "in_src_mask"): _decode,
    ("in_x0", "in_u0"): _score,
    ("predictions", "gsm_predictions"): _metrics,
    ("in_docs", "in_doc_lengths"): _packed,
    ("sft_pairs", "texts"): _data_prep,
}
