"""Where images come from: the only home of grain (and of tfds)."""
