"""Files of this machine that calls name: those of one folder, and no others."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from quire_cluster.config import MediaConfig
from quire_cluster.gateway.media import Media
from quire_engine.errors import InvalidParameter
from sites import LIMITS, PICTURE, WHAT


async def from_file(folder: Path, url: str) -> bytes:
    media = Media(MediaConfig(allowed_local_media_path=str(folder)), LIMITS)
    try:
        return await media.read(url, WHAT)
    finally:
        await media.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With what is to be read in it, and a secret beside it."""
    inside = tmp_path / "media"
    (inside / "deep" / "er").mkdir(parents=True)
    (inside / "a.png").write_bytes(PICTURE)
    (inside / "deep" / "er" / "ä b%.png").write_bytes(PICTURE)
    (inside / "large").write_bytes(bytes(100_001))
    (inside / "link.png").symlink_to("deep/er/ä b%.png")
    (inside / "loop").symlink_to("loop")
    os.mkfifo(inside / "pipe")
    (tmp_path / "secret").write_bytes(PICTURE)
    (tmp_path / "media-too").mkdir()
    (tmp_path / "media-too" / "secret").write_bytes(PICTURE)
    (inside / "out").symlink_to(tmp_path / "secret")
    (inside / "outside").symlink_to(tmp_path)
    (inside / "null").symlink_to("/dev/null")
    (tmp_path / "alias").symlink_to(inside)
    return inside


@pytest.mark.parametrize(
    "url",
    [
        "file://MEDIA/a.png",
        "FILE://MEDIA/a.png",
        "file://localhostMEDIA/a.png",
        "file://MEDIA/deep/../a.png",
        "file://MEDIA//./a.png",
        "file://MEDIA/deep/er/%C3%A4%20b%25.png",
        "file://MEDIA/link.png",
        "file://ALIAS/a.png",
    ],
)
def test_files_of_the_folder(folder: Path, url: str) -> None:
    alias = folder.parent / "alias"
    url = url.replace("MEDIA", str(folder)).replace("ALIAS", str(alias))
    assert asyncio.run(from_file(alias if "alias" in url else folder, url)) == PICTURE
    if "alias" not in url:
        assert asyncio.run(from_file(alias, url)) == PICTURE


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("file:///etc/hostname", "no such file"),
        ("file://MEDIA/../secret", "no such file"),
        ("file://MEDIA/%2e%2e/secret", "no such file"),
        ("file://MEDIA/%2E%2E%2Fsecret", "no such file"),
        ("file://MEDIA-too/secret", "no such file"),
        ("file://MEDIA/out", "no such file"),
        ("file://MEDIA/outside/secret", "no such file"),
        ("file://MEDIA/outside/media/../secret", "no such file"),
        ("file://MEDIA/null", "no such file"),
        ("file://MEDIA/pipe", "no such file"),
        ("file://MEDIA/loop", "no such file"),
        ("file://MEDIA/deep", "no such file"),
        ("file://MEDIA", "no such file"),
        ("file://MEDIA/", "no such file"),
        ("file://MEDIA/a.png/b", "no such file"),
        ("file://MEDIA/absent", "no such file"),
        ("file://MEDIA/%00", "no such file"),
        ("file://MEDIA/a.png%00", "no such file"),
        ("file://MEDIA/" + "a" * 300, "no such file"),
        ("file://MEDIA/%ff", "no such file"),
        ("file:///proc/self/environ", "no such file"),
        ("file://MEDIA/large", "has 100001 bytes"),
        ("file://example.org/MEDIA/a.png", "is written as"),
        ("file:MEDIA/a.png", "is written as"),
        ("file:a.png", "is written as"),
        ("file://", "is written as"),
        ("file://MEDIA/a.png?x", "is written as"),
    ],
)
def test_no_other_files(folder: Path, url: str, why: str) -> None:
    with pytest.raises(InvalidParameter, match=why) as refused:
        asyncio.run(from_file(folder, url.replace("MEDIA", str(folder))))
    assert str(refused.value).startswith(f"{WHAT}: ")
    assert str(folder) not in str(refused.value)


@pytest.mark.parametrize("swapped", ["deep", "deep/er"])
def test_a_link_that_comes_meanwhile_leads_nowhere(folder: Path, swapped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is swapped for a link once the path was looked at, before it is opened."""
    url = f"file://{folder}/deep/er/secret"
    (folder / "deep" / "er" / "secret").write_bytes(PICTURE)
    secrets = folder.parent / "secrets"
    (secrets / "er").mkdir(parents=True)
    for place in (secrets, secrets / "er"):
        (place / "secret").write_bytes(b"another")
    assert asyncio.run(from_file(folder, url)) == PICTURE
    real = os.path.realpath

    def realpath(path: str, **options: Any) -> str:
        found = real(path, **options)
        if found.endswith("secret"):
            (folder / swapped).rename(folder.parent / "moved")
            (folder / swapped).symlink_to(secrets)
        return found

    monkeypatch.setattr(os.path, "realpath", realpath)
    with pytest.raises(InvalidParameter, match="no such file"):
        asyncio.run(from_file(folder, url))
