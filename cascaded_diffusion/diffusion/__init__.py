"""One Gaussian diffusion, in JAX alone. It knows nothing of networks."""
