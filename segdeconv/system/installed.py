"""Which distribution provides a library that several distributions provide under one import name."""

from importlib import metadata

from segdeconv.errors import UsageError

# nrtk-albumentations is a maintained fork of 2.0.8 (MIT) with the same import name and the same draws; AlbumentationsX
# is the AGPL successor.
ALBUMENTATIONS = ("albumentations", "nrtk-albumentations", "albumentationsx")


def albumentations_version() -> tuple[str, str]:
    """Return the name and the version of the distribution that provides `albumentations`.

    Raises:
        UsageError: Several are installed. They write into one folder, so that the files of the last one to be installed
            lie between leftovers of the others.
        PackageNotFoundError: None is installed.
    """
    found = {name: version for name in ALBUMENTATIONS if (version := _version(name))}
    if len(found) > 1:
        raise UsageError(
            f"{' and '.join(found)} are installed, which write into one folder - repair it with: "
            f"pip uninstall -y {' '.join(found)} albucore; pip install albumentations==2.0.8 (or nrtk-albumentations)"
        )
    if not found:
        raise metadata.PackageNotFoundError(ALBUMENTATIONS[0])
    return next(iter(found.items()))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
