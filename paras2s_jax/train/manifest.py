"""What a written checkpoint consists of, file by file, so that a damaged one is recognised."""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from concurrent import futures

NAME = "manifest.json"
# Orbax writes these once more, or only, when the whole is committed: after the manifest.
UNLISTED = (NAME, "_CHECKPOINT_METADATA", "commit_success.txt")
# Digests leave Python's lock to others: one reader per core of a small host.
READERS = 8


def write(folder: pathlib.Path) -> None:
    """Reads every file of the folder back and lists it: {path: [bytes, sha256]}."""
    with futures.ThreadPoolExecutor(READERS) as pool:
        paths = sorted(_files(folder))
        found = dict(zip(paths, pool.map(lambda path: _describe(folder / path), paths)))
    (folder / NAME).write_text(json.dumps({"files": found}, indent=1) + "\n")


def problem(folder: pathlib.Path) -> str | None:
    """What the folder lacks of what its manifest lists, in words; None if it is whole."""
    try:
        listed = json.loads((folder / NAME).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {NAME}"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"{NAME} is cut off"
    # Sizes first: they are there at once, digests take a second per gigabyte.
    for path, (size, _) in listed.items():
        if not (folder / path).is_file():
            return f"{path} is missing"
        if (found := (folder / path).stat().st_size) != size:
            return f"{path} has {found} bytes instead of {size}"
    with futures.ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda path: _describe(folder / path), listed)
        for path, now in zip(listed, found, strict=True):
            if now != listed[path]:
                return f"{path} holds other bytes than were written"
    return None


def _files(folder: pathlib.Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        relative = path.relative_to(folder).as_posix()
        if path.is_file() and relative not in UNLISTED:
            yield relative


def _describe(path: pathlib.Path) -> list:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]
