"""Samplers as pure functions of (denoiser, x, schedule, draws).

A denoiser is called with x_t and the network's time, a plain number; it returns the network's (guided) output, ``(B, C,
S, S)`` or with the variance channels ``(B, 2C, S, S)``. Draws are a function that returns the next Gaussian noise.
"""
