"""The tables of all predictions in a folder: statistics.csv and regions.json."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from segdeconv.errors import UsageError
from segdeconv.inference.outputs import Outputs
from segdeconv.inference.progress_log import ProgressLog
from segdeconv.system.files import encode, replacing
from segdeconv.system.plain_data import Limits, read_json, require_mapping

REGION_LIMITS = Limits(size=1 << 28, nodes=20_000_000)


def write_tables(progress_log: ProgressLog, outputs: Outputs) -> list[Path]:
    """Write the tables of all predictions in the folder and return their paths.

    statistics.csv has one line for each image and class. regions.json (COCO) merges the NAME_regions.json files; it is
    written only if `outputs.polygons`. An existing table is replaced atomically.
    """
    progress_log.require_folder()
    files = [progress_log.out / "statistics.csv"]
    with replacing(files[0]) as file:
        file.write(b"name,class,pixels,share\n")
        for entry in progress_log.sorted():
            total = max(1, sum(entry["pixels"].values()))
            for class_name, count in entry["pixels"].items():
                file.write(encode(f"{_cell(entry['name'])},{_cell(class_name)},{count},{count / total:.6f}\n"))
    if outputs.polygons:
        files.append(progress_log.out / "regions.json")
        with replacing(files[1]) as file:
            file.write(b'{"images": [')
            entries = [
                entry
                for entry in progress_log.sorted()
                if any(name.endswith("_regions.json") for name in entry["files"])
            ]
            for number, entry in enumerate(entries, start=1):
                image = {
                    "id": number,
                    "file_name": entry["source"]["path"],
                    "height": entry["size"][0],
                    "width": entry["size"][1],
                }
                file.write(_separated(number, image))
            file.write(b'],\n"annotations": [')
            count = 0
            for number, entry in enumerate(entries, start=1):
                for annotation in _annotations(progress_log.out, entry["files"]):
                    count += 1
                    file.write(_separated(count, {**annotation, "id": count, "image_id": number}))
            categories = [{"id": index, "name": name} for index, name in enumerate(outputs.classes.names, start=1)]
            file.write(b'],\n"categories": ' + json.dumps(categories).encode() + b"}\n")
    return files


def _annotations(out: Path, files: Iterable[str]) -> Iterable[dict[str, Any]]:
    path = next(out / name for name in files if name.endswith("_regions.json"))
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
