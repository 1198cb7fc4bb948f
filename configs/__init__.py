"""Hydra configurations; a package, so that the search path finds them from any working directory."""
