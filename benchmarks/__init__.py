"""Speed and memory of the parts that must be fast; each file's ``measure()`` compares two ways in one run."""
