"""`python -m imagen_jax` is the `imagen-jax` command."""

from imagen_jax.cli.main import command

command()
