"""A full disk: the run stops with one sentence. Checkpoints appear whole or not at all, so that the last one stays."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

from mmcore_jax.config import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def needing_room(workdir: pathlib.Path) -> Iterator[None]:
    """Raises `UserError` where something could not be written for want of room, on this thread or in a checkpoint."""
    try:
        yield
    except (OSError, ValueError) as error:
        reasons = [os.strerror(code) for code in _FULL if os.strerror(code) in str(error)]
        if not reasons:
            raise
        raise UserError(
            f"there is no room for a checkpoint or a log of {workdir} ({reasons[0].lower()}): the run stops, its last "
            "whole checkpoint stays; make room and start it again."
        ) from error
