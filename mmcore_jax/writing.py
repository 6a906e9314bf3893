"""Local files that are there as a whole or not at all, however their writer ends."""

import contextlib
import pathlib
import secrets
from collections.abc import Iterator


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside `path` to write to, which takes its place at the end, or goes where the writing fails.

    Raises:
      OSError: if it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text; raises `OSError`."""
    with whole(path) as temporary:
        temporary.write_text(text)
