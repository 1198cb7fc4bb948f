"""Parts of ``python -m radd.reproduce``: settings, jobs on two processes, training, scoring, sampling, results."""
