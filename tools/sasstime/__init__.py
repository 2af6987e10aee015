"""sasstime: how long one SM of a Hopper GPU takes for a main loop, and why. See README.md."""
