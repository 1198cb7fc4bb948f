"""muP for diffusion transformers: DiT, PixArt-alpha and MMDiT (arXiv 2505.15270)."""
