"""LAMB (You et al., 2020) of timm, with its step count where checkpoints look for it."""

import torch
from timm.optim import Lamb

STEP = "step"


class ResumableLamb(Lamb):
    """timm's LAMB counts steps in the parameter group; here each parameter's state holds the count as well, so that it
    is saved and restored like every other optimizer state."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            counts = [self.state[p][STEP] for p in group["params"] if STEP in self.state.get(p, {})]
            if STEP not in group and counts:
                group[STEP] = counts[0].detach().clone().cpu()
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    self.state[parameter][STEP] = group[STEP].clone()
        return result
