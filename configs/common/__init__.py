"""Configuration groups that all papers compose."""
