"""Label images with a checkpoint.

    python scripts/predict.py CHECKPOINT PATH [PATH ...] [--out DIR] [key=value ...]

PATH is a picture, a folder of pictures (with its sub-folders) or a pattern such as 'photos/*.jpg'. For each image
DIR/<name>.png is an indexed palette mask of exactly the image's size and DIR/<name>_overlay.png shows it on the image
with a legend. --samples N predicts the mean of N passes with dropout, and DIR/<name>_uncertainty.png shows where they
disagree. --regions N sees each image through its N likeliest object proposals, --ensemble CHECKPOINT adds a second
network and --crf refines the outlines. A file that cannot be read gets one line and the rest goes on; the exit code is
then 2.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
from pathlib import Path

from segdeconv.errors import ArgumentParser, UsageError, run_command
from segdeconv.options import add_looks, looks_more, parted

LONGEST = 255  # bytes of a file's name


def main() -> int:
    """Parse, restore, predict each image."""
    parser = ArgumentParser("predict.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a .ckpt that train.py wrote")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="pictures, folders, patterns; then key=value")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    parser.add_argument("--samples", type=int, default=0, help="average over this many passes with dropout (default 0)")
    parser.add_argument("--probabilities", action="store_true", help="write DIR/<name>.npy: (classes, H, W) float16")
    parser.add_argument("--flip", action="store_true", help="average over each image and its mirror image")
    parser.add_argument("--precision", default="auto", help="auto (default), 32-true, bf16-mixed or 16-mixed")
    parser.add_argument("--trust", action="append", default=[], help="a class of your own that the recipe names")
    add_looks(parser)
    arguments = parser.parse_intermixed_args()
    overrides, crf_keys = parted(path for path in arguments.paths if is_override(path))
    kinds = ("", "_overlay", "_uncertainty") if arguments.samples else ("", "_overlay")
    images = find_images([path for path in arguments.paths if not is_override(path)], arguments.out, kinds)

    import numpy as np
    from tqdm import tqdm

    from segdeconv import checkpoint, draw
    from segdeconv.data.reading import MAX_PIXELS, read_upright, turn_back
    from segdeconv.data.transforms import Preprocessing
    from segdeconv.inference import best_device, labels, resized, resolve_precision
    from segdeconv.prediction import predictor_of
    from segdeconv.scoring import sampler_of, scorer_of

    read = checkpoint.read(arguments.checkpoint, trust=arguments.trust, overrides=overrides)
    settings = read.config["dataset"]
    preprocess = Preprocessing.restore({**read.facts["preprocessing"], "size": settings["size"]})
    channels = preprocess.channels if preprocess.as_stored else None
    precision = resolve_precision(arguments.precision, read.facts["precision"])
    model, device = read.model(), best_device()
    score = scorer_of(
        model, device, precision, flip=arguments.flip, smaller=lambda said: tqdm.write(said, file=sys.stdout)
    )
    draw_samples = None
    if arguments.samples:
        draw_samples = sampler_of(model, device, precision, arguments.samples, flip=arguments.flip)
    look = predictor_of(read, model, arguments, crf_keys, device) if looks_more(arguments, crf_keys) else None
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
            size = (image.shape[0], image.shape[1])
            drawn = draw_samples(ready[None]) if draw_samples else None
            scores = drawn.probabilities if drawn else look(image, name) if look else score(ready[None])
            scores = resized(scores, size)
            mask = labels(scores, size)[0].cpu().numpy()
            draw.save_mask(turn_back(mask, stored), read.classes, output(arguments.out, name, ".png"))
            picture = draw.overlay_with_legend(image, mask, read.classes)
            draw.save_image(picture, output(arguments.out, name, "_overlay.png"))
            if drawn:
                uncertainty = resized(drawn.uncertainty[None], size)[0, 0].cpu().numpy()
                heat = draw.heat(uncertainty, uncertainty.max())
                draw.save_image(heat, output(arguments.out, name, "_uncertainty.png"))
            if arguments.probabilities:
                likely = scores if drawn or look or arguments.flip else scores.float().softmax(dim=1)
                turned = [turn_back(one, stored) for one in likely[0].cpu().numpy()]
                partial = (arguments.out / name).with_name(f".tmp-{os.getpid()}.npy")
                np.save(partial, np.stack(turned).astype(np.float16))
                partial.replace(output(arguments.out, name, ".npy"))
    print(f"{len(images) - failed} masks and overlays in {arguments.out}")
    if failed:
        raise UsageError(f"{failed} of {len(images)} files could not be read, named above - mend or leave them out")
    return 0


def output(out: Path, name: str, ending: str) -> Path:
    """out/NAMEending; a name that is then too long for a file is cut, and ends in its hash."""
    path = out / f"{name}{ending}"
    if len(os.fsencode(path.name)) > LONGEST:
        stem = os.fsencode(Path(name).name)
        digest = hashlib.sha256(stem).hexdigest()[:8]
        kept = stem[: LONGEST - len(os.fsencode(ending)) - len(digest) - 1].decode(errors="ignore")
        path = path.with_name(f"{kept}~{digest}{ending}")
    return path


def is_override(argument: str) -> bool:
    """A `key=value`, and not a path that happens to have an equals sign in it."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and key.replace(".", "").replace("_", "").isalnum() and not Path(argument).exists()


def find_images(paths: list[str], out: Path, kinds: tuple[str, ...]) -> dict[str, Path]:
    """The pictures that the arguments mean, by the name (without suffix) of their output in `out`.

    kinds: how the names of the files that are written for each of them end.
    """
    from segdeconv.data.reading import SUFFIXES

    images: dict[str, Path] = {}
    owners: dict[str, Path] = {}

    def add(path: Path, name: str) -> None:
        for kind in kinds:
            owner = owners.setdefault(name + kind, path)
            if owner != path:
                raise UsageError(f"{path} and {owner} would both become {out / name}{kind}.png - use two folders")
        images[name] = path

    for argument in paths:
        found = [Path(argument)] if Path(argument).exists() else [Path(path) for path in sorted(glob.glob(argument))]
        if not found:
            raise UsageError(f"there is no {argument} - give pictures, folders, or a pattern in quotes")
        for path in found:
            if os.path.realpath(out) in (os.path.realpath(path), os.path.realpath(path.parent)):
                raise UsageError(f"--out {out} is the folder of the images, which would mix both - choose another")
            if not path.is_dir():
                add(path, path.stem)
                continue
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES]
            if not inside:
                raise UsageError(f"{path} holds no picture - the suffixes are {', '.join(sorted(SUFFIXES))}")
            for file in inside:
                if Path(os.path.realpath(out)) not in Path(os.path.realpath(file)).parents:
                    add(file, file.relative_to(path).with_suffix("").as_posix())
    if not images:
        raise UsageError("no image was given - name pictures, folders, or a pattern in quotes after the checkpoint")
    return images


if __name__ == "__main__":
    run_command(main)
