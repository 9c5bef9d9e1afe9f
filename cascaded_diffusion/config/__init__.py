"""Configs: their dataclasses, their conversion, their checks."""
