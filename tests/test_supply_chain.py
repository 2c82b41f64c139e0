"""What may be installed: floors above releases with known holes, exact versions that were tested, no bad release."""

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
DEVELOPED = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]
PINNED = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}

# Releases that must never be chosen, and why.
BAD = {
    "torch": ("2.5.1", "2.6.0", "2.9.1"),  # weights_only could be got round: CVE-2025-32434, CVE-2026-24747
    "pytorch-lightning": ("2.6.2", "2.6.3", "2.6.5"),  # malware; `_instantiator` in a checkpoint: CVE-2026-58659
    "hydra-core": ("1.3.2", "1.3.4", "1.3.6"),  # instantiate: CVE-2026-68508, CVE-2026-106439
    "pillow": ("10.0.0", "12.1.0", "12.9.0"),  # overflows in its JPEG reader
}


@pytest.mark.parametrize("name", BAD)
def test_no_release_with_a_known_hole_fits_the_requirements(name):
    assert not [version for version in BAD[name] if REQUIRED[name].specifier.contains(version)]


def test_constraints_name_a_version_that_fits_of_everything_that_is_required():
    for requirement in (*REQUIRED.values(), *DEVELOPED):
        version = PINNED[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_constraints_are_complete_for_what_is_installed_with_us():
    """Everything that our requirements pull in has its version there, all the way down."""
    waiting, seen = [canonicalize_name(requirement.name) for requirement in (*REQUIRED.values(), *DEVELOPED)], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    # torch brings the CUDA libraries of its build, which differ from machine to machine.
    ours = {name for name in seen if not name.startswith(("nvidia", "cuda", "triton"))}
    assert ours <= set(PINNED), sorted(ours - set(PINNED))


def test_every_promise_of_the_security_page_names_a_test_that_exists():
    page = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) >= 10
    for path, test in named:
        assert (ROOT / path).is_file(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), test
