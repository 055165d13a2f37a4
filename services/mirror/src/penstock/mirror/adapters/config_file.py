"""The mirror's file: JSON, watched."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec

from penstock.common.adapters.watched_file import WatchedFile, why_unreadable
from penstock.common.mirroring import BadMirrorConfig, parse_mirror
from penstock.mirror.ports import FileMissing, FileUnusable, Said

MAX_FILE_BYTES = 128 * 1024


class MirrorFile:
    """Fulfils `ports.ConfigFile`."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = WatchedFile(path, MAX_FILE_BYTES)

    async def look(self, *, again: bool) -> Said | None:
        """As the port says."""
        try:
            content = await self._file.look(again=again)
            if content is None:
                return None
            value: object = msgspec.json.decode(content.data)
            parse_mirror(value)
        except FileNotFoundError as exc:
            raise FileMissing from exc
        except BadMirrorConfig as exc:
            raise FileUnusable(str(exc)) from exc
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise FileUnusable(f"it is not JSON: {exc}") from exc
        except (OSError, ValueError) as exc:
            raise FileUnusable(why_unreadable(exc)) from exc
        return Said(value, _stamp(content.modified_at))


def _stamp(moment: float) -> str:
    """As the moments of documents are written."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
