"""What is depended on has bounds, and what is installed here lies within them."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from lowest import bounds


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split(".")[:3] if part.isdigit())


@pytest.mark.parametrize("name", bounds())
def test_what_is_installed_is_allowed(name):
    low, high = map(numbers, bounds()[name])
    assert low <= numbers(importlib.metadata.version(name)) < high


def test_the_lowest_versions_are_printed_as_constraints():
    script = Path(__file__).with_name("lowest.py")
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == len(bounds()) and "diffusers==0.42" in printed
