"""Helpers that the tests of every paper use: golden cases, process launching, tiny tasks."""
