"""Fine-tuning examples: ``bos prompt sep answer eos``, filled up to a fixed length, and which positions are given.

Padding is noised and learnt like the answer: it teaches the model where to stop; generated text is cut at it.
Source: specification 4.2.
"""

from collections.abc import Sequence

from common.data.packing import pack
from common.errors import ConfigError

__all__ = ["pack", "sft_example"]  # the two layouts of training rows: packed documents, and pairs

SPECIAL_TOKENS = 3  # bos, sep, eos
PROMPT_SHARE = 4  # a quarter of the room stays with a prompt that needs it, unless parity is asked for


def sft_example(
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    bos: int,
    sep: int,
    eos: int,
    pad: int,
    cutoff: int,
    parity: bool = True,
) -> tuple[list[int], list[int]]:
    """``(input_ids, src_mask)``, both of length ``cutoff``; src_mask is 1 on bos, prompt and sep.

    Args:
        cutoff: tokens of the example, at least 4.
        parity: truncate as the released code does: the answer keeps its first ``cutoff - 3`` tokens and the prompt its
            last remaining ones; where none remain the *whole* prompt stays, and the final cut drops the answer. False:
            a long answer leaves a quarter of the room to the prompt, and nothing is ever cut behind it.

    Raises: ConfigError if not even one token of an answer fits.
    """
    room = cutoff - SPECIAL_TOKENS
    if room < 1:
        raise ConfigError(f"model.length={cutoff} holds no prompt and answer; use at least {SPECIAL_TOKENS + 1}.")
    prompt, answer = list(prompt_ids), list(answer_ids)
    if parity:
        answer = answer[:room]
        prompt = prompt[-(room - len(answer)) :]  # -0 keeps everything: see above
    else:
        answer = answer[: room - min(len(prompt), room // PROMPT_SHARE)]
        kept = room - len(answer)
        prompt = prompt[len(prompt) - kept :] if len(prompt) > kept else prompt
    given = [bos, *prompt, sep]
    ids = [*given, *answer, eos]
    ids += [pad] * (cutoff - len(ids))
    src_mask = [1] * len(given) + [0] * (len(ids) - len(given))
    return ids[:cutoff], src_mask[:cutoff]
