"""A causal language model with one low-rank adapter, its text, and how well it predicts the next token.

Dimensions: N rows of text, L tokens of a row, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.data.corpora import build_text_dataset, load_data_tokenizer
from common.errors import ConfigError, DataError
from common.precision import autocast, has_native_bf16
from common.seeding import derive_seed, generator
from rpg.adapters import to_peft_names
from rpg.lora_config import AdapterSection
from rpg.zoo.networks import State

HELD_OUT_EVERY, HELD_OUT_REMAINDER = 10, 5  # rows index % 10 == 5 are tested on and not trained on


def build_adapted_model(section: AdapterSection, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """The language model, frozen, with a new adapter.

    Raises: DataError if the model cannot be loaded; ConfigError if it has none of the layers to adapt.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    in_bf16 = section.precision == "bf16" and has_native_bf16(torch.device(device))
    try:
        base = AutoModelForCausalLM.from_pretrained(
            section.model, dtype=torch.bfloat16 if in_bf16 else torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"adapters.model={section.model} cannot be loaded ({str(error).strip().splitlines()[0]}); give a folder of "
            "the transformers library with config.json and model.safetensors, or a name on the hub."
        ) from None
    config = LoraConfig(
        r=section.rank,
        lora_alpha=2 * section.rank if section.alpha is None else section.alpha,
        lora_dropout=section.dropout,
        use_dora=section.dora,
        target_modules=list(section.targets),
        task_type="CAUSAL_LM",
    )
    # peft draws the first factor from the global generator; its state comes back afterwards
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "adapter"))
        try:
            adapted = get_peft_model(base, config)
        except ValueError as error:
            raise ConfigError(
                f"adapters.targets={list(section.targets)}: {str(error).strip().splitlines()[0]} Name linear layers of "
                f"{section.model}."
            ) from None
    return adapted.to(device)


def load_adapter_state(model: nn.Module, state: State) -> None:
    """Puts an adapter's tensors into ``model``.

    Raises: DataError if a key is missing, unexpected or of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state, expected = to_peft_names(state), get_peft_model_state_dict(model)
    different = sorted(expected.keys() ^ state.keys())
    if different:
        where = "is missing" if different[0] in expected else "is unknown"
        raise DataError(f"this is no adapter of this model: {different[0]} {where} ({len(different)} such keys).")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise DataError(
                f"this is no adapter of this model: {name} has shape {tuple(value.shape)}, expected "
                f"{tuple(expected[name].shape)}."
            )
    set_peft_model_state_dict(model, state)


class AdapterText:
    """Rows of the corpus: nine of ten to train on, the others (at most ``test_rows``) to test with."""

    def __init__(self, section: AdapterSection, cache_dir: str | None = None) -> None:
        tokenizer = load_data_tokenizer(section.tokenizer or section.model, section.text, cache_dir=cache_dir)
        self._data = build_text_dataset(
            section.text, "train", length=section.length, tokenizer=tokenizer, cache_dir=cache_dir, progress=False
        )
        rows = range(len(self._data))
        self.train_rows = [row for row in rows if row % HELD_OUT_EVERY != HELD_OUT_REMAINDER]
        held_out = [row for row in rows if row % HELD_OUT_EVERY == HELD_OUT_REMAINDER]
        self.test_rows = held_out[: section.test_rows]
        if not self.test_rows:
            raise DataError(
                f"adapters.text={section.text} makes {len(rows)} rows of adapters.length={section.length} tokens; it "
                f"takes {HELD_OUT_REMAINDER + 1} to have one to test with. Use more text or shorter rows."
            )
        self.vocab_size = tokenizer.vocab_size

    def rows_NL(self, rows: list[int]) -> Tensor:
        """Token ids (N, L), int64."""
        return torch.stack([torch.as_tensor(self._data[row]["tokens"]) for row in rows])

    def batch_NL(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The training rows of a step: every row once per epoch, in an order of each epoch's own."""
        count = len(self.train_rows)
        drawn = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(position, count)
            drawn.append((epoch, place))
        orders = {
            epoch: torch.randperm(count, generator=generator(seed, "rows", epoch)).tolist()
            for epoch in {epoch for epoch, _ in drawn}
        }
        return self.rows_NL([self.train_rows[orders[epoch][place]] for epoch, place in drawn])


def next_token_losses(model: nn.Module, tokens_NL: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """(nll (N, L-1) in nats, predicted token (N, L-1))."""
    with autocast(precision, tokens_NL.device):
        logits_NLV = model(input_ids=tokens_NL, use_cache=False).logits[:, :-1].float()
    nll_NL = F.cross_entropy(logits_NLV.flatten(0, 1), tokens_NL[:, 1:].flatten(), reduction="none")
    return nll_NL.view(len(tokens_NL), -1), logits_NLV.argmax(dim=-1)


@torch.no_grad()
def predictions(
    model: nn.Module, tokens_NL: Tensor, micro_size: int, precision: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """(nll, predicted token) of ``micro_size`` rows at a time, in evaluation mode."""
    model.eval()
    for rows in tokens_NL.split(micro_size):
        yield next_token_losses(model, rows, precision)


def compute_score(model: nn.Module, tokens_NL: Tensor, micro_size: int, precision: str) -> tuple[float, float]:
    """(mean nll in nats per token, share of tokens that are predicted right)."""
    nll, right, count = 0.0, 0, 0
    for part, (nll_NL, predicted_NL) in zip(
        tokens_NL.split(micro_size), predictions(model, tokens_NL, micro_size, precision)
    ):
        nll += float(nll_NL.double().sum())
        right += int((predicted_NL == part[:, 1:]).sum())
        count += nll_NL.numel()
    return nll / count, right / count


def forward_precision(section: AdapterSection, device: torch.device | str) -> str:
    """``bf16`` where it is asked for and the hardware has it, else ``fp32``."""
    return "bf16" if section.precision == "bf16" and has_native_bf16(torch.device(device)) else "fp32"


def check_vocabulary(model: nn.Module, text: AdapterText, section: AdapterSection) -> None:
    """Raises: ConfigError if the tokenizer has more tokens than the model."""
    rows = model.get_input_embeddings().weight.shape[0]
    if text.vocab_size > rows:
        raise ConfigError(
            f"adapters.tokenizer={section.tokenizer or section.model} has {text.vocab_size} tokens, "
            f"{section.model} only {rows}; use the model's own tokenizer."
        )
