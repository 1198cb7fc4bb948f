"""RPG: recurrent diffusion for parameter generation: a folder of checkpoints becomes a generator of new ones."""
