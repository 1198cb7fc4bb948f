"""Networks, data and recipes whose checkpoints the generators learn from."""
