"""Training in a world, and its recipes. It may import all of `nova_worlds` and `nova_video` but `cli`."""
