"""Weights of U-Nets from elsewhere: their names, their layouts, and runs made of them."""
