"""Parts of ``python -m mup_dit.reproduce``: settings, training of the arms, coordinate checks, results."""
