"""`python -m imagen_jax` is the `imagen-jax` command."""

import sys

from imagen_jax.cli.main import main

sys.exit(main())
