"""Parts of ``python -m diffullama.reproduce``: settings, training of the arms, scoring, results."""
