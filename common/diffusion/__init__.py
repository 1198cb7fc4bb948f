"""Diffusion processes that more than one paper uses: schedules, corruption, time draws and sampling machinery."""
