"""Samples: making them, storing them, reading those of others."""
