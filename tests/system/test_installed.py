"""Libraries that several distributions provide under one import name."""

from importlib import metadata

import pytest

from segdeconv.errors import UsageError
from segdeconv.system import installed


def _distribution(folder, name, version):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize("names", [("albumentations",), ("nrtk-albumentations",), ("albumentationsx",)])
def test_the_distribution_that_provides_albumentations_is_named(names, tmp_path, monkeypatch):
    _distribution(tmp_path, names[0], "9.1")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert installed.albumentations_version() == (names[0], "9.1")


def test_two_distributions_of_one_import_name_are_refused_with_the_commands_that_repair_it(tmp_path, monkeypatch):
    _distribution(tmp_path, "albumentations", "2.0.8")
    _distribution(tmp_path, "nrtk-albumentations", "2.3.0")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(UsageError, match="pip uninstall -y albumentations nrtk-albumentations albucore; pip install"):
        installed.albumentations_version()


def test_none_is_named_when_none_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(metadata.PackageNotFoundError):
        installed.albumentations_version()
