"""The neural networks: the only home of flax. They know nothing of diffusion maths."""
