"""A user's sentence to a vector of classes: one question per class to a chat model, or a table of words.

The vector has a 1 for every class that fits; the class-conditional generator takes it as its condition.

Source: the prompt-to-network demonstration of Wang et al. (2025), which asks Qwen2.5 about each class of CIFAR-10. Its
reading of the answer, any "no" inside any word, is ``reading="letters"``; the default looks for whole words.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from common.config import require_choice
from common.errors import CheckpointError, ConfigError
from common.seeding import derive_seed
from rpg.prompt_rules import LABEL_SETS, build_vocabulary, select

SYSTEM_PROMPT = (
    "You are an exact discriminator. You are given the name of a class and a description. Reply with the single word "
    "YES if the class name fits the description, and with the single word NO if it does not. Reply with nothing else."
)
QUESTION = "Class name: {name}\nDescription: {description}\nDoes the class name fit the description? YES or NO?"
READINGS = ("words", "letters")
DECISIONS = ("generate", "likelihood")
RULES = "rules"

logger = logging.getLogger(__name__)


class ChatModel(Protocol):
    """A model that answers one question."""

    def answer(self, system: str, question: str) -> str: ...


def prompt_vector(
    sentence: str, names: Sequence[str], chat: ChatModel | None, *, reading: str = "words"
) -> tuple[int, ...]:
    """1 for every class that the sentence asks for, 0 for the others.

    Args:
        sentence: e.g. "select all living things".
        names: of the classes, in the order of the condition.
        chat: asked once per class; None: the table of words.
        reading: of its answers, see ``read_answer``; also of the sentence, see ``description_of``.

    Raises: ConfigError if the sentence is empty, or the table knows none of its words.
    """
    if not sentence.strip():
        raise ConfigError("the prompt is empty; describe the classes, for example 'select all living things'.")
    description = description_of(sentence, whole_words=reading == "words")
    if chat is None:
        chosen = select(description, build_vocabulary(names))
        return tuple(int(index in chosen) for index in range(len(names)))
    return tuple(
        read_answer(chat.answer(SYSTEM_PROMPT, QUESTION.format(name=name, description=description)), reading=reading)
        for name in names
    )


def description_of(sentence: str, *, whole_words: bool = True) -> str:
    """What follows the last word about selecting; the sentence itself if there is none, or nothing follows.

    Args:
        whole_words: "select", "classify", "find" and their forms and "all"; False: any word that contains "select",
            "classif", "find" or "all", as the reference, for which "small animals" asks for "animals".
    """
    pattern = r"(?:select|classif|find)\w*|all" if whole_words else r".*(?:select|classif|find|all).*"
    words = sentence.split()
    marks = [index for index, word in enumerate(words) if re.fullmatch(pattern, word.strip(".,:;!?\"'").lower())]
    rest = " ".join(words[marks[-1] + 1 :]) if marks else ""
    return rest or sentence.strip()


def read_answer(answer: str, *, reading: str = "words") -> int:
    """1 for yes, 0 for no.

    Args:
        reading: ``words``: the first whole word "yes" or "no" decides, after any part between ``<think>`` tags;
            ``letters``: 0 if "no", "No" or "NO" occurs anywhere, also inside a word. Everything else is 1 in both.
    """
    require_choice("reading", reading, READINGS)
    if reading == "letters":
        return int(not any(letters in answer for letters in ("no", "No", "NO")))
    said = re.search(r"\b(yes|no)\b", re.sub(r"<think>.*?</think>", " ", answer, flags=re.DOTALL).lower())
    if said is None:
        logger.warning("the chat model answered %r, neither yes nor no; it counts as yes", answer.strip()[:80])
        return 1
    return int(said[1] == "yes")


class HuggingFaceChat:
    """A chat model of transformers.

    Args:
        model: causal language model, frozen.
        tokenizer: with a chat template; without one the two prompts and "Answer:" are put one after another.
        decision: ``generate`` writes an answer; ``likelihood`` compares the next token's probability of YES and NO,
            which takes one evaluation and never fails to answer.
        max_new_tokens: of a written answer.
        sample: draw the answer as the model's generation settings say; False: the likeliest words.
        seed: of the drawing; answers depend on it and on the question.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: object,
        *,
        decision: str = "generate",
        max_new_tokens: int = 512,
        sample: bool = False,
        seed: int = 0,
    ) -> None:
        require_choice("decision", decision, DECISIONS)
        self.model, self.tokenizer, self.decision = model.eval().requires_grad_(False), tokenizer, decision
        self.max_new_tokens, self.sample, self.seed = max_new_tokens, sample, seed

    @torch.no_grad()
    def answer(self, system: str, question: str) -> str:
        """The model's reply: its text, or ``YES`` or ``NO`` by likelihood."""
        device = next(self.model.parameters()).device
        encoded = {name: value.to(device) for name, value in self._encode(system, question).items()}
        if self.decision == "likelihood":
            logits_V = self.model(**encoded).logits[0, -1].float()
            return "YES" if self._best(logits_V, "yes") > self._best(logits_V, "no") else "NO"
        prompt_length = encoded["input_ids"].shape[1]
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # transformers draws from the global generator
            torch.manual_seed(derive_seed(self.seed, "prompt") % 2**63)
            tokens_1T = self.model.generate(
                **encoded,
                max_new_tokens=self.max_new_tokens,
                do_sample=self.sample,
                pad_token_id=self._pad_token(),
                **({} if self.sample else {"temperature": None, "top_p": None, "top_k": None}),
            )
        return self.tokenizer.decode(tokens_1T[0, prompt_length:], skip_special_tokens=True)

    def _encode(self, system: str, question: str) -> dict[str, torch.Tensor]:
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            encoded = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            encoded = self.tokenizer(f"{system}\n\n{question}\nAnswer:", return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}

    def _best(self, logits_V: torch.Tensor, word: str) -> float:
        """The highest score of a way to begin the word."""
        spellings = [form for plain in (word, word.upper(), word.capitalize()) for form in (plain, f" {plain}")]
        first = {tokens[0] for form in spellings if (tokens := self.tokenizer.encode(form, add_special_tokens=False))}
        return max((float(logits_V[token]) for token in first), default=float("-inf"))

    def _pad_token(self) -> int | None:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def build_chat(
    model: str,
    device: torch.device | str = "cpu",
    *,
    decision: str = "generate",
    max_new_tokens: int = 512,
    sample: bool = False,
    seed: int = 0,
) -> ChatModel | None:
    """The chat model of a folder or hub name such as ``Qwen/Qwen2.5-3B-Instruct``; None for ``rules``.

    Raises: CheckpointError if nothing can be loaded.
    """
    if model == RULES:
        return None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"local_files_only": Path(model).is_dir()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
        network = AutoModelForCausalLM.from_pretrained(model, dtype="auto", use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"chat_model={model} could not be loaded ({type(error).__name__}: {lines[0][:160]}); give a folder with "
            f"config.json, model.safetensors and the tokenizer's files, a hub name, or chat_model={RULES}."
        ) from None
    return HuggingFaceChat(
        network.to(device), tokenizer, decision=decision, max_new_tokens=max_new_tokens, sample=sample, seed=seed
    )


def class_names(value: str | Sequence[str]) -> tuple[str, ...]:
    """Names of classes: a known label set (``cifar10``, ``digits``), a text file with one per line, or a list.

    Raises: ConfigError for an unknown set or an empty list.
    """
    if not isinstance(value, str):
        names = tuple(str(name) for name in value)
    elif value in LABEL_SETS:
        names = LABEL_SETS[value]
    elif Path(value).is_file():
        names = tuple(line.strip() for line in Path(value).read_text(encoding="utf-8").splitlines() if line.strip())
    else:
        raise ConfigError(
            f"classes={value} is neither a label set ({', '.join(LABEL_SETS)}) nor a text file with one name per line."
        )
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"classes={list(names)} must be different names, at least one.")
    return names
