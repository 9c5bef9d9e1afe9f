"""The metrics: features in, one number out."""
