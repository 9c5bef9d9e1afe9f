"""Feature extractors: images in, features out."""
