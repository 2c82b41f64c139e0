"""Dependencies: minimum versions above releases with known vulnerabilities, and pinned versions that were tested."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}
DEVELOPMENT = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]
SERVING = {requirement.name: requirement for requirement in map(Requirement, PROJECT["optional-dependencies"]["serve"])}
PINNED = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}

# Releases that must never be installed, with the reason.
VULNERABLE = {
    "torch": ("2.5.1", "2.6.0", "2.9.1"),  # weights_only could be circumvented: CVE-2025-32434, CVE-2026-24747
    "pytorch-lightning": ("2.6.2", "2.6.3", "2.6.5"),  # malware; `_instantiator` in a checkpoint: CVE-2026-58659
    "hydra-core": ("1.3.2", "1.3.4", "1.3.6"),  # instantiate: CVE-2026-68508, CVE-2026-106439
    "pillow": ("10.0.0", "12.1.0", "12.9.0"),  # overflows in its JPEG reader
    "h11": ("0.14.0", "0.15.0"),  # accepts malformed chunks: CVE-2025-43859
    "starlette": ("0.40.0", "0.47.1", "0.49.0"),  # requests that block it: CVE-2025-54121, CVE-2025-62727
}


@pytest.mark.parametrize("name", VULNERABLE)
def test_no_release_with_a_known_hole_fits_the_requirements(name):
    assert not [version for version in VULNERABLE[name] if (REQUIRED | SERVING)[name].specifier.contains(version)]


def test_constraints_pin_an_allowed_version_of_every_requirement():
    for requirement in (*REQUIRED.values(), *DEVELOPMENT):
        version = PINNED[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_constraints_pin_all_installed_dependencies():
    """This includes the dependencies of dependencies."""
    waiting = [canonicalize_name(requirement.name) for requirement in (*REQUIRED.values(), *DEVELOPMENT)]
    required = set()
    while waiting:
        name = waiting.pop()
        if name in required:
            continue
        required.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # required on another platform only
            continue
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    # torch requires the CUDA libraries of its build, which differ between machines.
    expected = {name for name in required if not name.startswith(("nvidia", "cuda", "triton"))}
    assert expected <= set(PINNED), sorted(expected - set(PINNED))


def test_every_test_named_in_security_md_exists():
    page = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) >= 10
    for path, test in named:
        assert (ROOT / path).is_file(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), test
