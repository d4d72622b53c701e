"""The rendered world: images, captions and changes in words, everything from a seed."""
