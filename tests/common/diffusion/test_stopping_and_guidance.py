"""Ending texts early leaves the law of what comes before; guidance is the formula it says."""

import pytest
import torch
from scipy import stats

from common.diffusion.absorbing import plan_rows, run_events
from common.diffusion.decoding import run_selection
from common.diffusion.guidance import GuidedDenoiser
from common.diffusion.orders import SelectionRule
from common.diffusion.reveal import AFTER_STOP, diffusion_events
from common.diffusion.stopping import StopRule
from common.errors import ConfigError
from common.testing.toy_denoiser import ToyDenoiser

SAMPLES = 6000
STOP = StopRule(ids=[0], fill_id=2)


def cut_law(toy: ToyDenoiser) -> dict[tuple[int, ...], float]:
    """Exact probabilities of the texts up to and including their first stop token."""
    law: dict[tuple[int, ...], float] = {}
    for number, probability in enumerate(toy.joint_K.tolist()):
        digits = [number // toy.tokens ** (toy.length - 1 - place) % toy.tokens for place in range(toy.length)]
        end = digits.index(0) + 1 if 0 in digits else toy.length
        law[tuple(digits[:end])] = law.get(tuple(digits[:end]), 0.0) + probability
    return law


@pytest.mark.parametrize("engine", ["events", "selection"])
def test_the_law_of_the_text_before_its_end_stays(engine: str):
    toy = ToyDenoiser(tokens=3, length=3, seed=1)
    draw = torch.Generator().manual_seed(3)
    canvas_BL = toy.canvas(SAMPLES)
    if engine == "events":
        levels_BL, uniform_BL = torch.rand(2, SAMPLES, 3, generator=draw, dtype=torch.float64)
        plan = plan_rows(canvas_BL, diffusion_events(levels_BL, canvas_BL == toy.mask_id, None), uniform_BL)
        finished = list(run_events(toy, [plan], stop=STOP))
    else:
        rule = SelectionRule(order="random", per_call=1)
        finished = list(run_selection(toy, [(torch.arange(SAMPLES), canvas_BL)], rule, mask_id=3, stop=STOP))
    law = cut_law(toy)
    counts = dict.fromkeys(law, 0)
    skipped = 0
    for row in finished:
        written = [(place, int(token)) for place, token in enumerate(row.tokens_L) if row.revealed_L[place] >= 0]
        end = next((place for place, token in written if token == 0), 2)
        counts[tuple(row.tokens_L[: end + 1].tolist())] += 1
        behind = row.revealed_L == AFTER_STOP
        assert (row.tokens_L[behind] == 2).all()
        assert row.calls == 3 - int(behind.sum())
        skipped += int(behind.sum())
    assert skipped > SAMPLES / 10
    expected = [SAMPLES * law[text] for text in law]
    assert stats.chisquare(list(counts.values()), expected).pvalue > 1e-3


def test_only_written_tokens_end_a_text():
    tokens_RL = torch.tensor([[0, 1, 0, 2], [1, 0, 1, 1]])
    written_RL = torch.tensor([[False, True, True, True], [False, False, True, True]])
    assert STOP.first(tokens_RL, written_RL).tolist() == [2, 4]
    assert STOP.behind(tokens_RL, written_RL).tolist() == [[False, False, False, True], [False] * 4]


def test_a_stop_rule_needs_an_id():
    with pytest.raises(ConfigError, match="at least one"):
        StopRule(ids=[], fill_id=0)


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_guidance_weighs_the_two_predictions(scale: float):
    toy = ToyDenoiser(tokens=3, length=3)
    tokens_RL = torch.tensor([[1, 3, 2], [0, 3, 3]])
    where_RL = tokens_RL == 3
    given_RL = ~where_RL
    got = GuidedDenoiser(toy, 3, scale, keep=1).at_rows(tokens_RL, where_RL, index_R=torch.arange(2), given_RL=given_RL)
    without = tokens_RL.clone()
    without[0, 2] = 3  # position 0 is kept
    mixed = (1 + scale) * toy(tokens_RL, where_RL)[:, :3] - scale * toy(without, where_RL)[:, :3]
    assert torch.allclose(got[:, :3], mixed.log_softmax(-1), atol=1e-5)
    assert (got[:, 3] == -torch.inf).all()
    with pytest.raises(ConfigError, match="guidance=-1"):
        GuidedDenoiser(toy, 3, -1)
