"""The tables of all predictions in a folder: statistics.csv, statistics.parquet and regions.json."""

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from segdeconv.errors import UsageError
from segdeconv.inference.outputs import PARQUET, REGIONS
from segdeconv.inference.progress_log import ProgressLog
from segdeconv.system.files import encode, replacing, replacing_path
from segdeconv.system.plain_data import Limits, read_json, require_mapping

COLUMNS = ("name", "class", "pixels", "share", "file", "area_m2")
REGION_LIMITS = Limits(size=1 << 28, nodes=20_000_000)


class Row(NamedTuple):
    """The pixels of a class in an image; the columns of statistics.csv.

    Attributes:
        name: Name of the image's outputs.
        class_name: The class.
        pixels: Number of pixels.
        share: Fraction of the pixels with data, 0..1.
        file: Path of the image as it was given.
        area_m2: Area in square metres, if the scale of the image is known.
    """

    name: str
    class_name: str
    pixels: int
    share: float
    file: str
    area_m2: float | None


def require_pyarrow() -> None:
    """Raise UsageError unless pyarrow, which writes Parquet, is installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageError("--parquet needs pyarrow, which is not installed - pip install 'segdeconv[tables]'")


def write_tables(progress_log: ProgressLog, tables: Sequence[str], class_names: Sequence[str]) -> list[Path]:
    """Write the tables of all predictions in the folder and return their paths.

    statistics.csv has one line for each image and class, and statistics.parquet the same columns with their types.
    regions.json (COCO) merges the NAME_regions.json files. An existing table is replaced atomically.

    Args:
        progress_log: The progress log of the folder.
        tables: The names of the tables, see `Outputs.tables`.
        class_names: The names of the classes, in order.
    """
    progress_log.require_folder()
    files = [progress_log.out.path / name for name in tables]
    with replacing(files[0]) as file:
        file.write(f"{','.join(COLUMNS)}\n".encode())
        for row in _statistics(progress_log):
            area = "" if row.area_m2 is None else f"{row.area_m2:.9g}"
            cells = (_cell(row.name), _cell(row.class_name), row.pixels, f"{row.share:.6f}", _cell(row.file), area)
            file.write(encode(f"{','.join(map(str, cells))}\n"))
    if PARQUET in tables:
        _write_parquet(progress_log.out.path / PARQUET, _statistics(progress_log))
    if REGIONS in tables:
        with replacing(progress_log.out.path / REGIONS) as file:
            file.write(b'{"images": [')
            entries = [
                entry
                for entry in progress_log.sorted()
                if any(name.endswith("_regions.json") for name in entry["files"])
            ]
            for number, entry in enumerate(entries, start=1):
                image = {
                    "id": number,
                    "file_name": _file_name(entry),
                    "height": entry["size"][0],
                    "width": entry["size"][1],
                }
                file.write(_separated(number, image))
            file.write(b'],\n"annotations": [')
            count = 0
            for number, entry in enumerate(entries, start=1):
                for annotation in _annotations(progress_log.out.path, entry["files"]):
                    count += 1
                    file.write(_separated(count, {**annotation, "id": count, "image_id": number}))
            categories = [{"id": index, "name": name} for index, name in enumerate(class_names, start=1)]
            file.write(b'],\n"categories": ' + json.dumps(categories).encode() + b"}\n")
    return files


def _statistics(progress_log: ProgressLog) -> Iterator[Row]:
    for entry in progress_log.sorted():
        total, pixel_area = max(1, sum(entry["pixels"].values())), entry.get("pixel_area")
        for class_name, count in entry["pixels"].items():
            area = None if pixel_area is None else count * pixel_area
            yield Row(entry["name"], class_name, count, count / total, _file_name(entry), area)


def _write_parquet(path: Path, rows: Iterable[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    types = (
        pyarrow.string(),
        pyarrow.string(),
        pyarrow.int64(),
        pyarrow.float64(),
        pyarrow.string(),
        pyarrow.float64(),
    )
    columns: list[list[Any]] = [list(values) for values in zip(*rows, strict=True)] or [[] for _ in COLUMNS]
    readable = [[encode(value).decode() if isinstance(value, str) else value for value in values] for values in columns]
    arrays = [pyarrow.array(values, type=type_) for values, type_ in zip(readable, types, strict=True)]
    with replacing_path(path) as partial:
        pyarrow.parquet.write_table(pyarrow.table(arrays, names=list(COLUMNS)), partial)


def _file_name(entry: Mapping[str, Any]) -> str:
    """Return the path of an image as it was given; its absolute path in a folder of an earlier version."""
    return str(entry.get("file") or entry["source"]["path"])


def _annotations(out: Path, files: Iterable[str]) -> Iterable[dict[str, Any]]:
    path = next(out / name for name in files if name.endswith("_regions.json"))
    if path.stat().st_size > REGION_LIMITS.size:
        raise UsageError(
            f"{path} has more than {REGION_LIMITS.size >> 20} MiB of regions, too many for regions.json - give "
            "--polygon-format geojson or gpkg and --overwrite, or merge small regions with --min-area"
        )
    try:
        annotations = require_mapping(read_json(path, REGION_LIMITS)).get("annotations")
        return TypeAdapter(list[dict[str, Any]]).validate_python(annotations)
    except ValueError as error:
        raise UsageError(f"{path} does not contain the regions that predict writes - add --overwrite") from error


def _separated(number: int, entry: dict[str, Any]) -> bytes:
    return (b"" if number == 1 else b",\n") + json.dumps(entry).encode()


def _cell(text: str) -> str:
    """Quote a CSV field where RFC 4180 requires it."""
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\r\n') else text
