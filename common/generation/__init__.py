"""Texts written by samplers: what is given, the file they go to, the rows of each process, views of a run."""
