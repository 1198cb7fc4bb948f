"""A few rows of every task's data set, in the published format, and a tiny model with a real tokenizer to run them."""

import json
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common.data.text import embedded_documents
from common.data.tokenizer import HuggingFaceTokenizer, train_bpe
from common.testing.golden import fill
from diffullama.loading import save_model
from diffullama.model import DiffusionLM
from diffullama.special_tokens import SpecialTokens
from diffullama.tasks.context import Context

STORIES = [
    ["Tom had a dog.", "It was old.", "One day it ran away.", "Tom looked for it.", "He found it in the park."],
    ["Ann baked a cake.", "She took eggs.", "The oven was hot.", "It smelled good.", "Everybody ate some."],
]
CHECK = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(0, 0) == 0\n"
ROWS: dict[str, list[dict]] = {
    "lambada": [{"text": "he opened the door and saw the door"}, {"text": "she read the book that he wrote\n"}],
    "hellaswag": [
        {
            "activity_label": "Baking",
            "ctx_a": "A woman mixes dough [substeps] in a bowl.",
            "ctx_b": "she",
            "endings": ["puts it in the oven [title] Done", "flies.", "sings a song.", "is a bowl."],
            "label": str(number % 4),
        }
        for number in range(5)
    ],
    "winogrande": [
        {
            "sentence": "The trophy did not fit into the bag because the _ was too big.",
            "option1": "trophy",
            "option2": "bag",
            "answer": "1",
        },
        {"sentence": "_ thanked Ann, for she had helped Bob.", "option1": "Ann", "option2": "Bob", "answer": "2"},
    ],
    "piqa": [
        {"goal": "Open a jar", "sol1": "twist the lid", "sol2": "twist the jar's glass", "label": 0},
        {"goal": "Dry a cup", "sol1": "put it in water", "sol2": "use a towel", "label": 1},
    ],
    "siqa": [
        {
            "context": "Kim helped Lee move.",
            "question": "How would Lee feel?",
            "answerA": "thankful",
            "answerB": "angry at Kim",
            "answerC": "hungry",
            "label": "1",
        }
    ],
    "triviaqa": [
        {
            "question": "Which city is the capital of France?",
            "answer": {"value": "Paris", "aliases": ["Paris", "City of Paris"]},
        }
    ],
    "squad": [
        {
            "context": "The sky is blue.",
            "question": "What colour is the sky?",
            "answers": {"text": ["blue", "a blue"], "answer_start": [11, 11]},
        }
    ],
    "rocstories": [
        {
            **{f"input_sentence_{n + 1}": story[n] for n in range(4)},
            "sentence_quiz1": "Nothing.",
            "sentence_quiz2": story[4],
            "answer_right_ending": 2,
        }
        for story in STORIES
    ],
    "gsm8k": [{"instruction": "Tom has 2 and gets 3. How many?", "output": "<<2+3=5>> #### 5"}],
    "humaneval_infill": [
        {
            "task_id": "SingleLineInfilling/HumanEval/0/L0",
            "entry_point": "add",
            "prompt": "def add(a, b):\n",
            "suffix": "    return total\n",
            "canonical_solution": "    total = a + b\n",
            "test": CHECK,
        }
    ],
}


def write_rows(folder: Path) -> dict[str, str]:
    """One jsonl file a task; task -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {}
    for task, rows in ROWS.items():
        path = folder / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        places[task] = str(path)
    return places


def tiny_tokenizer() -> HuggingFaceTokenizer:
    """Byte-pair encoding with 300 entries of the embedded text."""
    return train_bpe(embedded_documents("train", "topics")[:20], 300)


def tiny_model(positions: int = 192, shift: bool = True) -> DiffusionLM:
    """GPT-2 of width 16 for the tokenizer's 300 ids and a mask."""
    config = GPT2Config(
        vocab_size=301, n_positions=positions, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return DiffusionLM(fill(GPT2LMHeadModel(config), 3), 300, shift).eval()


SPECIAL = SpecialTokens(300, 0, 0, 0, None)


def tiny_context(**options) -> Context:
    """The tiny model as tasks take it."""
    settings = {"model": tiny_model(), "tokenizer": tiny_tokenizer(), "special": SPECIAL, "max_length": 192}
    return Context(**settings | options)


def save_tiny_model(folder: Path) -> str:
    """The tiny model as a folder."""
    return str(save_model(folder, tiny_model(), tiny_tokenizer(), SPECIAL))


def memorising_denoiser(model: DiffusionLM, answer: torch.Tensor) -> None:
    """Makes the model's predictions put everything on the tokens of ``answer`` by position."""

    def denoise(tokens_RL: torch.Tensor, where_RL: torch.Tensor) -> torch.Tensor:
        position_P = where_RL.nonzero()[:, 1]
        log_probs_PV = torch.full((len(position_P), model.vocab_size), -torch.inf)
        log_probs_PV[torch.arange(len(position_P)), answer[position_P]] = 0.0
        return log_probs_PV

    model.denoise = denoise
