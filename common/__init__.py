"""What at least two of the five papers share; knows nothing of any paper."""
