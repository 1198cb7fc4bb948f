"""RADD: masked diffusion language models whose network never sees the time (arXiv 2406.03736)."""
