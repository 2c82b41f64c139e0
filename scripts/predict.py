"""Label images with a checkpoint.

    python scripts/predict.py CHECKPOINT PATH [PATH ...] [--out DIR] [key=value ...]

PATH is a picture, a folder of pictures (with its sub-folders) or a pattern such as 'photos/*.jpg'. For each image
DIR/<name>.png is an indexed palette mask of exactly the image's size and DIR/<name>_overlay.png shows it on the image
with a legend. A file that cannot be read gets one line and the rest goes on; the exit code is then 2.
"""

from __future__ import annotations

import glob
import sys
from pathlib import Path

from segdeconv.errors import ArgumentParser, UsageError, run_command


def main() -> int:
    """Parse, restore, predict each image."""
    parser = ArgumentParser("predict.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a .ckpt that train.py wrote")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="pictures, folders, patterns; then key=value")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    parser.add_argument("--flip", action="store_true", help="average over each image and its mirror image")
    parser.add_argument("--precision", default="auto", help="auto (default), 32-true, bf16-mixed or 16-mixed")
    parser.add_argument("--trust", action="append", default=[], help="a class of your own that the recipe names")
    arguments = parser.parse_intermixed_args()
    overrides = [path for path in arguments.paths if is_override(path)]
    images = find_images([path for path in arguments.paths if not is_override(path)], arguments.out)

    import torch
    from tqdm import tqdm

    from segdeconv import checkpoint, draw
    from segdeconv.data.reading import MAX_PIXELS, read_upright, turn_back
    from segdeconv.data.transforms import Preprocessing
    from segdeconv.inference import best_device, labels, resolve_precision
    from segdeconv.report import scorer_of

    read = checkpoint.read(arguments.checkpoint, trust=arguments.trust, overrides=overrides)
    settings = read.config["dataset"]
    preprocess = Preprocessing.restore({**read.facts["preprocessing"], "size": settings["size"]})
    channels = preprocess.channels if preprocess.as_stored else None
    precision = resolve_precision(arguments.precision, read.facts["precision"])
    score = scorer_of(read.model(), best_device(), precision, flip=arguments.flip)
    failed = 0
    with tqdm(images.items(), unit="image", disable=None) as bar:
        for name, path in bar:
            try:
                max_pixels = settings.get("max_pixels", MAX_PIXELS)
                image, stored = read_upright(path, channels=channels, max_pixels=max_pixels)
                ready = preprocess(image, path)
            except UsageError as error:
                failed += 1
                tqdm.write(f"skipped: {error}", file=sys.stdout)
                continue
            scores = score(ready[None])
            mask = labels(scores, (image.shape[0], image.shape[1]))[0].to(torch.device("cpu")).numpy()
            draw.save_mask(turn_back(mask, stored), read.classes, arguments.out / f"{name}.png")
            picture = draw.overlay_with_legend(image, mask, read.classes)
            draw.save_image(picture, arguments.out / f"{name}_overlay.png")
    print(f"{len(images) - failed} masks and overlays in {arguments.out}")
    if failed:
        raise UsageError(f"{failed} of {len(images)} files could not be read, named above - mend or leave them out")
    return 0


def is_override(argument: str) -> bool:
    """A `key=value`, and not a path that happens to have an equals sign in it."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and key.replace(".", "").replace("_", "").isalnum() and not Path(argument).exists()


def find_images(paths: list[str], out: Path) -> dict[str, Path]:
    """The pictures that the arguments mean, by the name (without suffix) of their output in `out`."""
    from segdeconv.data.reading import SUFFIXES

    images: dict[str, Path] = {}

    def add(path: Path, name: str) -> None:
        for written in (name, f"{name}_overlay"):
            if written in images and images[written] != path:
                raise UsageError(
                    f"{path} and {images[written]} would both become {out / written}.png - use two folders"
                )
        images[name] = path

    for argument in paths:
        found = [Path(argument)] if Path(argument).exists() else [Path(path) for path in sorted(glob.glob(argument))]
        if not found:
            raise UsageError(f"there is no {argument} - give pictures, folders, or a pattern in quotes")
        for path in found:
            if path.resolve() == out.resolve() or path.parent.resolve() == out.resolve():
                raise UsageError(f"--out {out} is the folder of the images, which would mix both - choose another")
            if not path.is_dir():
                add(path, path.stem)
                continue
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES]
            if not inside:
                raise UsageError(f"{path} holds no picture - the suffixes are {', '.join(sorted(SUFFIXES))}")
            for file in inside:
                if out.resolve() not in file.resolve().parents:
                    add(file, file.relative_to(path).with_suffix("").as_posix())
    if not images:
        raise UsageError("no image was given - name pictures, folders, or a pattern in quotes after the checkpoint")
    return images


if __name__ == "__main__":
    run_command(main)
