"""Cascaded diffusion models (Ho et al., 2021) in JAX."""
