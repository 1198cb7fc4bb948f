"""DiffuGPT and DiffuLLaMA: causal language models adapted into absorbing diffusion models (arXiv 2410.17891)."""
