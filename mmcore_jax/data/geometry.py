"""The sizes that turn examples into tokens, from the parts of a model: patches, grids, buckets of aspect ratios."""

import dataclasses
import math
from collections.abc import Collection

from mmcore_jax.config import Config, Data, Model, QwenVision, UserError


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes that turn an example into tokens; 0 where a stage has no such part, or is given its features.

    The VLM sees images of `vlm_pixels` pixels, from the least to the most. An example that generates images is cropped
    to one of `buckets`, (rows, columns) of latent patches; without a diffusion transformer only their ratio matters.
    `target_size` is the side of what the vision target sees, `latent_patch` the pixels along a side of a latent patch,
    and `latent_capacity` the most latent patches of an image.
    """

    vlm_pixels: tuple[int, int]
    vision_patch: int
    merge: int
    query_grid: int
    target_size: int
    buckets: tuple["Shape", ...]
    latent_patch: int
    latent_capacity: int

    @property
    def merged_patch(self) -> int:
        """Pixels along a side of a merged patch, one IMAGE token."""
        return self.vision_patch * self.merge

    def drawn(self, shape: "Shape") -> tuple[int, int]:
        """Height and width of the pixels that the autoencoder sees of a bucket."""
        return tuple(int(self.latent_patch * side) for side in shape)


Shape = tuple[float, float]  # height and width, in any unit


def derive(model: Model, data: Data) -> Geometry:
    """Derives the sizes from the parts of a model.

    Raises:
      UserError: if an image size or the budget of vision patches does not fit the patches of a part, the diffusion
        transformer does not fit the autoencoder, there are more images than frame embeddings, or no aspect ratio.
    """
    vision = model.vlm.vision
    _check_vision(vision, data)
    target = model.vision_target.vision if model.vision_target else None
    if target and target.image_size // target.patch_size < model.queries.grid:
        raise UserError(
            f"config.model.queries.grid {model.queries.grid} is finer than the vision target's patches, "
            f"{target.image_size // target.patch_size} a side."
        )
    if model.frames and data.budgets.images > model.frames.count + 1:
        raise UserError(
            f"config.data.budgets.images {data.budgets.images} are more than config.model.frames tells apart: make its "
            f"count {data.budgets.images - 1} at least."
        )
    if not data.aspect_ratios:
        raise UserError("config.data.aspect_ratios is empty: name one at least, such as 1.0 for squares.")
    buckets = _buckets(model, data) if model.dit else tuple((1, ratio) for ratio in data.aspect_ratios)
    return Geometry(
        vlm_pixels=data.vlm_pixels,
        vision_patch=vision.patch_size,
        merge=vision.merge_size,
        query_grid=model.queries.grid,
        target_size=target.image_size if target else 0,
        buckets=buckets,
        latent_patch=_latent_patch(model) if model.dit else 0,
        latent_capacity=max(map(math.prod, buckets)) if model.dit else 0,
    )


def without(sizes: Geometry, given: Collection[str]) -> Geometry:
    """The sizes of what still has to be looked at, where some kinds of features are given."""
    sizes = dataclasses.replace(sizes, vision_patch=0) if "conditioning" in given else sizes
    sizes = dataclasses.replace(sizes, target_size=0) if "targets" in given else sizes
    return dataclasses.replace(sizes, latent_patch=0) if "latents" in given else sizes


def of_size(model: Model, sizes: Geometry, height: int, width: int, name: str) -> Geometry:
    """The same where all that is drawn or looked back at has `height` x `width` pixels, which errors call `name`.

    Raises:
      UserError: if the size does not divide into latent patches, or has more than the table of positions.
    """
    shape = _latent_shape(model, height, width, name)
    return dataclasses.replace(sizes, buckets=(shape,), latent_capacity=math.prod(shape))


def one_bucket(config: Config) -> bool:
    """Whether all examples of a batch have to share one of several buckets, since the run encodes their images."""
    if config.data.layout == "pairs" or not config.model.dit or "latents" in config.data.features:
        return False
    return len(derive(config.model, config.data).buckets) > 1


def _check_vision(vision: QwenVision, data: Data) -> None:
    if data.vlm_pixels is None:
        raise UserError(
            "config.data.vlm_pixels is None, but the stage has a VLM: give its images' least and most pixels."
        )
    (least, most), token = data.vlm_pixels, (vision.patch_size * vision.merge_size) ** 2
    if not token <= least <= most:
        raise UserError(f"config.data.vlm_pixels {data.vlm_pixels} must ascend, from {token}, the pixels of a token.")
    patches = data.budgets.vision_patches
    if patches % vision.merge_size**2:
        raise UserError(
            f"config.data.budgets.vision_patches {patches} must be a multiple of {vision.merge_size**2}, the patches "
            "of a merged token."
        )


def _buckets(model: Model, data: Data) -> tuple[tuple[int, int], ...]:
    """Of each aspect ratio, rows and columns of latent patches, no more than a square of `data.image_size` has."""
    taken, made = model.dit.latent_channels, model.autoencoder.latent_channels
    if taken != made:
        raise UserError(
            f"config.model.dit.latent_channels is {taken}, but the latents of config.model.autoencoder "
            f"have {made} channels: make it {made}."
        )
    size, patch = data.image_size, _latent_patch(model)
    side, _ = _latent_shape(model, size, size, f"config.data.image_size {size}")
    buckets = {_nearest_shape(ratio, side**2): ratio for ratio in data.aspect_ratios}
    for (rows, cols), ratio in buckets.items():
        name = f"config.data.aspect_ratios {ratio:g} at image_size {size}"
        _latent_shape(model, rows * patch, cols * patch, name)
    return tuple(buckets)


def _nearest_shape(ratio: float, area: int) -> tuple[int, int]:
    """The rows and columns of no more than `area` that the largest rectangle of an aspect ratio fits into."""
    shapes = ((rows, min(area // rows, math.ceil(rows * ratio))) for rows in range(1, area + 1))
    return max(shapes, key=lambda shape: min(shape[0], shape[1] / ratio))


def _latent_patch(model: Model) -> int:
    """Pixels along a side of a latent patch."""
    return model.dit.patch_size * model.autoencoder.downsampling


def _latent_shape(model: Model, height: int | None, width: int | None, name: str) -> tuple[int, int]:
    """Rows and columns of latent patches of an image."""
    patch, grid = _latent_patch(model), model.dit.position_grid
    if not (height and width) or height % patch or width % patch:
        raise UserError(f"{name} must be a multiple of {patch}, for latent patches.")
    rows, cols = height // patch, width // patch
    if "sincos" in model.dit.position and max(rows, cols) > grid:
        raise UserError(
            f"{name} makes {max(rows, cols)} latent patches a side, but the table of positions has "
            f"config.model.dit.position_grid {grid}."
        )
    return rows, cols
