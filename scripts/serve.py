"""Serve a web page on this machine to try a network on your own images.

    python scripts/serve.py CHECKPOINT [--port 8000] [--host 127.0.0.1] [--samples N] [key=value ...]

Open the printed address in a browser and drop an image on the page. Ctrl-C stops the server.
"""

from segdeconv.cli.command import ArgumentParser, run_command
from segdeconv.cli.options import add_checkpoint, add_network_options, refuse_int8
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError, warn


def main() -> None:
    """Parse the command line, read the checkpoint and serve the page."""
    parser = ArgumentParser("serve.py", description=__doc__.splitlines()[0])
    add_checkpoint(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.max_pixels=50000000")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free port (default 8000)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    add_network_options(parser)
    arguments = parser.parse_intermixed_args()
    refuse_int8(arguments.precision)
    if not 0 <= arguments.port <= 65535:
        raise UsageError(f"--port {arguments.port} is not a valid port - give 0 to 65535")

    from segdeconv.inference.predictors import PredictionSettings
    from segdeconv.inference.segmenter import Segmenter
    from segdeconv.serving.predictor import ImagePredictor

    try:
        from segdeconv.serving.server import Server
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        raise UsageError(f'serving the page needs {library} - pip install "segdeconv[serve]"') from error

    checkpoint = read_checkpoint(arguments.checkpoint, arguments.trust, arguments.overrides)
    settings = PredictionSettings(precision=arguments.precision, samples=arguments.samples)
    predictor = ImagePredictor(Segmenter(checkpoint, settings, at_once=True))
    server = Server(predictor, arguments.host, arguments.port)
    if not server.loopback:
        warn(
            f"--host {arguments.host} lets everyone on your network send images and see the results, without "
            "encryption or authentication"
        )
    print(f"{predictor.name}, {len(predictor.classes)} classes: {server.url}", flush=True)
    print("Press Ctrl-C to stop.", flush=True)
    server.serve()


if __name__ == "__main__":
    run_command(main)
