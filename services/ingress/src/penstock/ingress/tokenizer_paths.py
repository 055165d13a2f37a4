"""Where tokenizers are, as `--tokenizer-path` says it."""

from __future__ import annotations

from pathlib import Path


def tokenizer_folders(text: str) -> dict[str, Path]:
    """Folders by model, "" for all others, of a folder or of `model=folder,...`.

    Raises:
        ValueError: naming every entry that is no folder with a tokenizer.json.
    """
    folders: dict[str, Path] = {}
    faults = []
    for entry in filter(None, map(str.strip, text.split(","))):
        model, mark, folder = entry.rpartition("=")
        if mark and not model:
            faults.append(f"{entry!r} names no model")
        if model in folders:
            faults.append(f"{model or 'the tokenizer of all models'} is named twice")
        if not (Path(folder) / "tokenizer.json").is_file():
            faults.append(f"{folder!r} is no folder with a tokenizer.json")
        folders[model] = Path(folder)
    if faults:
        raise ValueError("; ".join(faults))
    return folders
