"""Fixtures of the runtime's tests; a module that needs another model or cache defines its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import CommandLine, tiny_bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("model") / "tiny.bundle")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], cache_dir: Path) -> CommandLine:
    return CommandLine(capfd, cache_dir)
