"""Metrics of image sets: FID, sFID, Inception Score, precision and recall, clean FID, CLIP score."""
