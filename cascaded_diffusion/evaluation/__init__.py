"""Scoring: generate, extract features, compare, choose, stop. Never imports training."""
