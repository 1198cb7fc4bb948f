"""The small reproduction of LoGAH: hypernetworks on embedded data, and what networks become that start from them."""
