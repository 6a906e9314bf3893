"""Published checkpoints in and out: `load`, `export`, and one file a family."""

from mmcore_jax.pretrained.model import Pretrained, export, is_published, load

__all__ = ["Pretrained", "export", "is_published", "load"]
