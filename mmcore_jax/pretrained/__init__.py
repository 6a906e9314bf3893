"""Published checkpoints in and out: `load`, `export`, and one file a family."""

from mmcore_jax.pretrained.files import check_new, new_directory
from mmcore_jax.pretrained.model import (
    PIPELINE,
    Pretrained,
    abstract_params,
    differences,
    export,
    family_of,
    files_to_fetch,
    is_published,
    load,
    open_part,
    read,
)

__all__ = [
    "PIPELINE",
    "Pretrained",
    "abstract_params",
    "check_new",
    "differences",
    "export",
    "family_of",
    "files_to_fetch",
    "is_published",
    "load",
    "new_directory",
    "open_part",
    "read",
]
