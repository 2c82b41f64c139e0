"""The regions of a mask as map features: GeoJSON and GeoPackage.

GeoJSON has map coordinates and the member `crs` of its first version, https://geojson.org/geojson-spec#named-crs, which
GDAL and QGIS read and write; RFC 7946 only has longitudes and latitudes. A CRS without a code in a register
cannot be named, so its regions are converted to longitudes and latitudes.
"""

import importlib.util
import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.annotations.polygons import Region, signed_area
from segdeconv.data.files.geo import INSTALL, Georeference
from segdeconv.errors import UsageError
from segdeconv.system.files import replacing, replacing_path

WGS84 = {"4326", "4979"}  # EPSG codes of longitude and latitude as GPS has them
PIXELS = 'LOCAL_CS["pixels: x to the right, y downwards",UNIT["pixel",1]]'
FRACTION = 1e-4  # of a pixel, to which coordinates are written


def require_pyogrio() -> None:
    """Raise UsageError unless pyogrio, which writes GeoPackage, is installed."""
    if importlib.util.find_spec("pyogrio") is None:
        raise UsageError(f"--polygon-format=gpkg needs pyogrio, which is not installed - {INSTALL}")


def write_geojson(
    path: Path, regions: Sequence[Region], classes: Classes, image: str, reference: Georeference | None
) -> None:
    """Write regions as GeoJSON, in map coordinates if the image has a CRS and otherwise in pixels.

    Args:
        path: The file.
        regions: The regions.
        classes: Their classes.
        image: The file name of the image.
        reference: Where the image lies.
    """
    header: dict[str, Any] = {"type": "FeatureCollection", "name": path.stem}
    place, digits = _placement(reference)
    if reference is None or not reference.located:
        header["description"] = "pixel coordinates: x to the right, y downwards"
    elif reference.authority is None or (reference.authority[0] == "EPSG" and reference.authority[1] in WGS84):
        header["crs"] = _named("OGC:1.3:CRS84")
        if reference.authority is None:
            place, digits = _converted(reference), 9  # of a degree, 0.1 mm
    else:
        header["crs"] = _named(f"{reference.authority[0]}::{reference.authority[1]}")
    with replacing(path) as file:
        file.write(json.dumps(header)[:-1].encode() + b', "features": [')
        for number, region in enumerate(regions):
            rings = [np.round(ring, digits).tolist() for ring in _rings(region, place)]
            feature = {
                "type": "Feature",
                "properties": _properties(region, classes, image, reference),
                "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]] for ring in rings]},
            }
            file.write((b",\n" if number else b"\n") + json.dumps(feature).encode())
        file.write(b"\n]}\n")


def write_geopackage(
    path: Path, regions: Sequence[Region], classes: Classes, image: str, reference: Georeference | None
) -> None:
    """Write regions as the layer `regions` of a GeoPackage; the arguments are those of `write_geojson`."""
    import pyogrio

    place, _ = _placement(reference)
    rows = [_properties(region, classes, image, reference) for region in regions]
    types = {"class": object, "class_index": np.int32, "pixels": np.int64, "area_m2": float, "score": float}
    columns = {name: [row[name] for row in rows] for name in (*types, "image")}
    fields = [np.array(values, dtype=types.get(name, object)) for name, values in columns.items()]
    with replacing_path(path) as partial:
        pyogrio.raw.write(
            str(partial),
            np.array([_well_known_binary(_rings(region, place)) for region in regions], dtype=object),
            fields,
            list(columns),
            field_mask=[np.isnan(values) if values.dtype == float else None for values in fields],
            layer="regions",
            driver="GPKG",
            geometry_type="Polygon",
            crs=reference.crs if reference is not None and reference.located else PIXELS,
        )


def _named(name: str) -> dict[str, Any]:
    return {"type": "name", "properties": {"name": f"urn:ogc:def:crs:{name}"}}


Place = Callable[[np.ndarray], np.ndarray]


def _placement(reference: Georeference | None) -> tuple[Place, int]:
    """Return the function from pixel corners to the coordinates of the features, and the digits of these."""
    if reference is None or not reference.located:
        return lambda corners: corners, 0
    a, b, _, d, e, _ = reference.transform
    side = min(math.hypot(a, d), math.hypot(b, e))
    return reference.to_map, max(0, math.ceil(-math.log10(FRACTION * side)))


def _converted(reference: Georeference) -> Place:
    return lambda corners: reference.to_wgs84(reference.to_map(corners))


def _rings(region: Region, place: Place) -> list[np.ndarray]:
    """Return the rings of a region, the outer one counterclockwise and the holes clockwise where y points up."""
    rings = []
    for number, corners in enumerate(region.rings):
        ring = place(corners)
        rings.append(ring if (signed_area(ring) > 0) == (number == 0) else ring[::-1])
    return rings


def _properties(
    region: Region, classes: Classes, image: str, reference: Georeference | None
) -> dict[str, str | int | float | None]:
    area = None if reference is None or reference.pixel_area is None else region.area * reference.pixel_area
    return {
        "class": classes.names[region.class_index],
        "class_index": region.class_index,
        "pixels": region.area,
        "area_m2": None if area is None else float(f"{area:.9g}"),
        "score": round(region.score, 4),
        "image": image,
    }


def _well_known_binary(rings: Sequence[np.ndarray]) -> bytes:
    """Return a polygon as OGC's well-known binary."""
    parts = [struct.pack("<BII", 1, 3, len(rings))]
    for ring in rings:
        closed = np.concatenate([ring, ring[:1]]).astype("<f8")
        parts += [struct.pack("<I", len(closed)), closed.tobytes()]
    return b"".join(parts)
