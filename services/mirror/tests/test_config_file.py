"""The mirror's file, changed in every way that people and Kubernetes change files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from penstock.mirror.adapters.config_file import MAX_FILE_BYTES, MirrorFile
from penstock.mirror.ports import FileMissing, FileUnusable, Said


def text(ratio: int) -> str:
    return json.dumps({"Enable": True, "Target": "http://a", "Ratio": ratio})


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def ratio(said: Said | None) -> int | None:
    return None if said is None else said.value["Ratio"]  # type: ignore[index]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mirror.json"


async def test_it_says_what_it_holds_once_and_again_when_asked(path: Path) -> None:
    file = MirrorFile(path)
    with pytest.raises(FileMissing):
        await file.look(again=False)
    write(path, text(1))
    os.utime(path, (0, 1_700_000_000.25))
    said = await file.look(again=False)
    assert (ratio(said), said and said.modified_at) == (1, "2023-11-14T22:13:20.250000Z")
    assert await file.look(again=False) is None
    assert ratio(await file.look(again=True)) == 1
    os.unlink(path)
    with pytest.raises(FileMissing):
        await file.look(again=False)


async def test_one_written_in_place_is_read_once_it_stands_still(path: Path) -> None:
    file = MirrorFile(path)
    write(path, text(1))
    await file.look(again=False)
    for piece in (text(2)[:10], text(2)):
        write(path, piece)
        assert await file.look(again=False) is None
    assert ratio(await file.look(again=False)) == 2


async def test_one_put_in_its_place_is_read_at_once(path: Path) -> None:
    file = MirrorFile(path)
    write(path, text(1))
    await file.look(again=False)
    write(fresh := path.with_name("fresh"), text(2))
    os.replace(fresh, path)
    assert ratio(await file.look(again=False)) == 2


async def test_a_link_that_is_turned_is_followed(path: Path) -> None:
    """A mounted ConfigMap: mirror.json -> ..data/mirror.json, ..data -> ..<time>."""
    file, folder = MirrorFile(path), path.parent
    for version in (1, 2):
        (folder / f"..{version}").mkdir()
        (folder / f"..{version}" / "mirror.json").write_text(text(version))
    (folder / "..data").symlink_to("..1")
    os.symlink("..data/mirror.json", path)
    assert ratio(await file.look(again=False)) == 1
    (folder / "..tmp").symlink_to("..2")
    os.rename(folder / "..tmp", folder / "..data")
    assert ratio(await file.look(again=False)) == 2


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is not JSON: Input data was truncated"),
        (b'{"Enable": tru', "it is not JSON: "),
        (b'{"Enable": true} {', "it is not JSON: "),
        (b"\xff\xfe", "it is not JSON: "),
        (b"[" * 100_000, "it is not JSON: "),
        (b'{"Ratio": NaN}', "it is not JSON: "),
        (b"[]", "must be a JSON object, is an array"),
        (b'{"Ratio": 101}', "Ratio: Input should be less than or equal to 100, got '101'"),
        (b"#" * (MAX_FILE_BYTES + 1), f"it is over {MAX_FILE_BYTES} bytes"),
    ],
)
async def test_what_is_no_configuration_is_refused_with_its_reason(
    path: Path, content: bytes, why: str
) -> None:
    file = MirrorFile(path)
    write(path, content)
    with pytest.raises(FileUnusable) as refused:
        await file.look(again=False)
    assert str(refused.value).startswith(why)


async def test_a_folder_is_no_configuration(path: Path) -> None:
    os.mkdir(path)
    with pytest.raises(FileUnusable, match="Is a directory"):
        await MirrorFile(path).look(again=False)
