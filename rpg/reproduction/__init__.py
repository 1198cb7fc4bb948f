"""Parts of ``python -m rpg.reproduce``: settings, collection, training, generation and scoring, results."""
