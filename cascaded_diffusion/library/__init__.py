"""What notebooks and other programs call: configs, trained cascades, training, samplers."""
