"""`imagen-jax serve`: a page in the browser that draws pictures."""

import argparse
import importlib.util
import sys
import tempfile
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from imagen_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

EXAMPLE = """example:
  imagen-jax serve --model=demo

Then open the address that it prints. Only this machine reaches the page unless --host says otherwise: there is
no password. Requests are drawn one after the other. Ctrl-C ends it. Needs pip install 'imagen_jax[serve]'.

The page is answered under localhost, --host and the address that it listens at (with --host=0.0.0.0: any address of
the machine), and to pages of its own only. Another name, such as a proxy's or the machine's, needs --allow_host."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "--model", required=True, help="model folder (`imagen-jax export`), or demo, the model in the package"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s)")
    parser.add_argument(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name under which the page is reached; may be repeated, or several with commas",
    )
    parser.add_argument(
        "--port", type=int, default=8080, help="port; 0: any that is free (default %(default)s)"
    )
    parser.add_argument(
        "--out", help="folder that keeps the pictures, as `imagen-jax sample` does; default: none is kept"
    )
    parser.add_argument("--batch_size", type=int, default=4, help="pictures drawn at a time (default 4)")
    parser.add_argument(
        "--max_pictures",
        type=int,
        default=64,
        metavar="N",
        help="of a request at most, 1 to 64 (%(default)s)",
    )
    parser.add_argument(
        "--max_steps",
        type=int,
        default=1000,
        metavar="N",
        help="of a stage at most, 1 to 5000, where they are not its own (%(default)s)",
    )
    parser.add_argument(
        "--fsdp", type=int, default=1, help="devices over which weights are split (default 1)"
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help='compiled programs; "off": none; default: $IMAGEN_JAX_CACHE or ~/.cache',
    )


def _mesh(fsdp: int) -> "Mesh | None":
    """All devices; None: there is one."""
    import jax

    from imagen_jax.parallel.mesh import MeshConfig, make_mesh

    count = len(jax.devices())
    if fsdp < 1 or count % fsdp:
        raise UserError(f"--fsdp {fsdp}: must divide the number of devices, {count}")
    return make_mesh(MeshConfig(fsdp=fsdp)) if count > 1 else None


def run(args: argparse.Namespace) -> int:
    """Serves the page until it is interrupted."""
    from imagen_jax.serving.request import Limits

    limits = Limits(pictures=args.max_pictures, steps=args.max_steps)
    if importlib.util.find_spec("nicegui") is None:
        raise UserError("the page needs NiceGUI: pip install 'imagen_jax[serve]'")
    from imagen_jax.serving.guard import Hosts
    from imagen_jax.serving.server import address, is_local, listen, serve

    with ExitStack() as stack:
        listener = stack.enter_context(listen(args.host, args.port))
        hosts = Hosts.of(args.host, listener.getsockname()[0], args.allow_host)

        from imagen_jax.files import make_folder
        from imagen_jax.sampling.cascade import Imagen
        from imagen_jax.serving.studio import Studio

        model = Imagen.load(args.model, mesh=_mesh(args.fsdp), cache=args.cache)
        out = args.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="imagen-jax-"))
        temporary = args.out is None
        studio = Studio(
            model, make_folder(out), batch_size=args.batch_size, temporary=temporary, limits=limits
        )
        if studio.passed_over:
            print(
                f"--out holds {len(studio.passed_over)} PNGs that stay and are not shown, such as "
                f"{studio.passed_over[0]}",
                file=sys.stderr,
            )
        if not is_local(listener):
            print(
                f"--host {args.host}: everybody who reaches this machine can draw and see pictures",
                file=sys.stderr,
            )
        with suppress(KeyboardInterrupt):  # which is how a server is ended
            serve(
                studio,
                listener,
                hosts,
                ready=lambda: print(f"{args.model} is at {address(listener)} · Ctrl-C ends it", flush=True),
            )
    return 0
