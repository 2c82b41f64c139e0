"""The command `label`, which serves the page that teaches a network by painting."""

from __future__ import annotations

import argparse
import glob
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from segdeconv.cli.command import ArgumentParser, local_path
from segdeconv.errors import UsageError, warn

if TYPE_CHECKING:
    from segdeconv.serving.label.storage import Storage


def parse(description: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser("label.py", description=description)
    add = parser.add_argument
    add("photos", metavar="PHOTOS", help="folder of photos (with sub-folders), a quoted pattern, or a list of files")
    text = (
        "start of the network: a run, a .ckpt, a shipped network (default camvid-small-286e5fc), imagenet (VGG11, "
        "downloaded), a torchvision VGG file (.pth), or nothing"
    )
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help=text)
    add("--out", type=local_path, metavar="DIR", help="folder of masks and session (default: PHOTOS-labels)")
    add("--classes", metavar="A,B,...", help="names of the first classes; more can be added on the page")
    add("--seconds", type=float, default=5.0, help="time to learn after a stroke (default 5)")
    text = "what learns at first: the decoder (default), or all layers, which is slower; nothing starts with all"
    add("--learn", choices=("decoder", "all"), help=text)
    text = "pixels of a photo as the network sees it (default 172800, 360x480); more for small things in large photos"
    add("--pixels", type=int, default=360 * 480, help=text)
    add("--port", type=int, default=8000, help="0 for any free port (default 8000)")
    add("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    add("--precision", default="auto", help="auto (default), 32-true, bf16-mixed or 16-mixed")
    add("--trust", action="append", default=[], help="allow a class of your own that the config names")
    return parser.parse_args()


def run(description: str) -> None:
    """Run the command: open or resume the session and serve its page.

    Raises:
        UsageError: An argument is invalid, or a library is missing.
    """
    arguments = parse(description)
    if not 0 <= arguments.port <= 65535:
        raise UsageError(f"--port {arguments.port} is not a valid port - give 0 to 65535")
    if not 0 < arguments.seconds <= 120:
        raise UsageError(f"--seconds {arguments.seconds:g} is not a time to learn - give up to 120")
    if not 64 * 64 <= arguments.pixels <= 1 << 24:
        raise UsageError(f"--pixels {arguments.pixels} is not a number of pixels - give 4096 to 16777216")
    if arguments.precision not in ("auto", "32-true", "bf16-mixed", "16-mixed"):
        raise UsageError(f"--precision {arguments.precision} is unknown - give auto, 32-true, bf16-mixed or 16-mixed")
    given = Path(arguments.photos)
    if arguments.out is None and not glob.glob(arguments.photos):
        raise UsageError(f"{arguments.photos} not found - give a folder of photos")
    if arguments.out is None and not given.is_dir():
        raise UsageError(f"{arguments.photos} is not a folder, so the folder of the masks has no name - add --out DIR")
    out = arguments.out or Path(f"{os.path.normpath(given)}-labels")

    from segdeconv.inference.inputs import find_images, is_video
    from segdeconv.serving.label.network import NOTHING, SMALL, describe_start, open_network
    from segdeconv.serving.label.session import Session
    from segdeconv.serving.label.storage import Storage

    try:
        from segdeconv.serving.label.server import LabelServer
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        raise UsageError(f'serving the page needs {library} - pip install "segdeconv[serve]"') from error

    photos = find_images([arguments.photos], out, [".png"])
    if videos := [path for path in photos.values() if is_video(path)]:
        raise UsageError(f"{videos[0]} is a video, and label shows photos - extract its frames first")
    start = arguments.checkpoint or SMALL
    learner, saved = open_network(
        out / "session", start, trust=arguments.trust, pixels=arguments.pixels, precision=arguments.precision
    )
    storage = Storage(out, photos)
    try:
        add_classes(storage, arguments.classes, learner.names if arguments.checkpoint else [])
        session = Session(storage, learner, saved=saved)
        scope: Literal["decoder", "all"] = "all" if start == NOTHING and saved is None else "decoder"
        if arguments.learn:
            scope = arguments.learn
        server = LabelServer(session, arguments.host, arguments.port, seconds=arguments.seconds, scope=scope)
        if not server.loopback:
            warn(
                f"--host {arguments.host} lets everyone on your network see the photos and change the masks, without "
                "encryption or authentication"
            )
        painted = sum(log.status != "none" for log in storage.logs.values())
        print(f"photos:   {len(photos)} in {arguments.photos}, {painted} with strokes")
        print(f"network:  {describe_start(start, saved is not None)}, {learner.precision} on {learner.device}")
        print(f"saved in: {out} (the same command resumes)")
        print(f"then:     {server.train_command()}")
        print(f"page:     {server.url}", flush=True)
        print("Press Ctrl-C to stop.", flush=True)
        try:
            server.serve(session.sweep)
        finally:
            session.save()
    finally:
        storage.close()


def add_classes(storage: Storage, typed: str | None, trained: list[str]) -> None:
    """Add the classes of --classes, or for a new session those of a checkpoint that was named."""
    from segdeconv.serving.label.classes import LabelClasses

    known = set(storage.classes.names.values())
    names = [name.strip() for name in typed.split(",")] if typed else ([] if known else trained)
    for name in names:
        if name not in known:
            storage.change_classes(partial(LabelClasses.add, name=name))
