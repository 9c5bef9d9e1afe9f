"""The neural networks: the only home of flax. They contain no diffusion maths."""
