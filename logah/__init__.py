"""LoGAH: hypernetworks that read a network's computational graph and predict all its parameters (arXiv 2405.16287)."""
