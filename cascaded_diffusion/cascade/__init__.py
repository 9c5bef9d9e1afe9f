"""What the paper adds: conditioning augmentation, stages and their cascade."""
