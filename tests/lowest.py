"""Print the lowest versions that pyproject.toml allows, as constraints for pip."""

import re
import sys
import tomllib
from pathlib import Path


def bounds() -> dict[str, tuple[str, str]]:
    """Return the lowest version of each dependency that is used, and the first one that is not allowed any more."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["lowmem"]]
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", each) for each in listed]
    assert all(found), [each for each, match in zip(listed, found, strict=True) if not match]
    return {match[1]: (match[2], match[3]) for match in found if match}


if __name__ == "__main__":
    # A version of two numbers has more behind it, and 2.9 is 2.9.0.
    for name, (low, _) in bounds().items():
        sys.stdout.write(f"{name}=={low}\n")
