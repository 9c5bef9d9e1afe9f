"""How a platform computes attention, normalization, sums and convolutions."""
