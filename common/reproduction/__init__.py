"""Small reproductions of the papers: jobs that are kept on disk, thresholds, and the section they end in."""
