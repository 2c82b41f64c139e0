"""Annotations of labelling tools: their formats, one a file, and what they have in common.

`find_annotations` finds and reads the annotations of a folder, `convert` writes them from masks.
"""

from segdeconv.data.annotations.class_labels import classes_of
from segdeconv.data.annotations.finding import AnnotatedFolder, find_annotations
from segdeconv.data.annotations.shapes import AnnotatedImage, Annotations, Ellipse, Polygon, RunLengths, Shape

__all__ = [
    "AnnotatedFolder",
    "AnnotatedImage",
    "Annotations",
    "Ellipse",
    "Polygon",
    "RunLengths",
    "Shape",
    "classes_of",
    "find_annotations",
]
