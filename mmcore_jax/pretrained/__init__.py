"""Published checkpoints in and out: `load`, `export`, and one file a family."""

from mmcore_jax.pretrained.files import check_new, new_directory
from mmcore_jax.pretrained.lora import without_lora
from mmcore_jax.pretrained.model import (
    PIPELINE,
    Pretrained,
    abstract_params,
    differences,
    export,
    export_adapter,
    family_of,
    files_to_fetch,
    is_published,
    load,
    open_part,
    read,
    settled,
)

__all__ = [
    "PIPELINE",
    "Pretrained",
    "abstract_params",
    "check_new",
    "differences",
    "export",
    "export_adapter",
    "family_of",
    "files_to_fetch",
    "is_published",
    "load",
    "new_directory",
    "open_part",
    "read",
    "settled",
    "without_lora",
]
