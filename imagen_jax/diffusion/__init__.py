"""The diffusion maths: no networks, no I/O."""
