"""Evaluators with more than one user: perplexity bounds, generative perplexity, diversity, the lm-eval adapter."""
