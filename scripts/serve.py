"""Try a network on a page of this machine.

    python scripts/serve.py CHECKPOINT [--port 8000] [--host 127.0.0.1] [--samples N] [key=value ...]

Open the address that it prints, drop a picture. Ctrl-C ends it.
"""

from __future__ import annotations

import sys

from segdeconv.cli.command import ArgumentParser, run_command
from segdeconv.errors import UsageError


def main() -> None:
    """Parse, read, serve."""
    parser = ArgumentParser("serve.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a .ckpt that train.py wrote, a .safetensors, or a shipped network")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.max_pixels=50000000")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (default 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine alone)")
    parser.add_argument("--samples", type=int, default=0, help="average over this many passes with dropout (default 0)")
    parser.add_argument("--precision", default="auto", help="auto (default), 32-true, bf16-mixed or 16-mixed")
    parser.add_argument("--trust", action="append", default=[], help="a class of your own that the recipe names")
    arguments = parser.parse_intermixed_args()
    if not 0 <= arguments.port <= 65535:
        raise UsageError(f"--port {arguments.port} is no port - give 0 to 65535")

    from segdeconv.checkpoints import checkpoint
    from segdeconv.serving.predictor import Looker
    from segdeconv.serving.server import Server

    read = checkpoint.read(arguments.checkpoint, trust=arguments.trust, overrides=arguments.overrides)
    looker = Looker(read, precision=arguments.precision, samples=arguments.samples)
    server = Server(looker, arguments.host, arguments.port)
    if not server.loopback:
        print(
            f"segdeconv: warning: --host {arguments.host} lets everyone on your network send pictures and see the "
            "answers; nothing is encrypted and nobody is asked who he is",
            file=sys.stderr,
        )
    print(f"{looker.name}, {len(looker.classes)} classes: {server.url}", flush=True)
    print("Ctrl-C ends it.", flush=True)
    server.serve()


if __name__ == "__main__":
    run_command(main)
