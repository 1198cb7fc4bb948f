"""Data that at least two papers share: embedded text, sources, tokenizers, packing, token caches and loaders."""
