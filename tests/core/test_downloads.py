"""Downloads: whole and right, or not at all."""

import hashlib
from pathlib import Path

import pytest

from inversion_core.downloads import CHUNK, DownloadError, fetch

CONTENT = b"weights" * (CHUNK // 4)
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def url(tmp_path: Path) -> str:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    return source.as_uri()


def test_the_file_arrives_with_its_progress(url: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "new" / "weights.safetensors"
    fetch(url, target, HASH, lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == CONTENT
    assert seen == [(CHUNK, len(CONTENT)), (len(CONTENT), len(CONTENT))]


def test_another_file_is_refused_and_the_old_one_stays(url: str, tmp_path: Path) -> None:
    target = tmp_path / "folder" / "weights.safetensors"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(DownloadError, match=f"{HASH}.*expected"):
        fetch(url, target, "0" * 64)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert target.read_bytes() == b"old"


def test_an_interrupted_download_leaves_nothing(url: str, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        raise Interrupted

    target = tmp_path / "folder" / "weights.safetensors"
    with pytest.raises(Interrupted):
        fetch(url, target, HASH, interrupt)
    assert list(target.parent.iterdir()) == []


def test_a_url_without_a_file_says_which(tmp_path: Path) -> None:
    missing = (tmp_path / "missing").as_uri()
    with pytest.raises(DownloadError, match=f"{missing} could not be fetched"):
        fetch(missing, tmp_path / "weights.safetensors", HASH)
