"""Files as others write them: npz archives, images, paths."""
