"""MMCORE, the paper's Figure 5, as pure functions of parameters and batches.

    text, images, queries -> VLM -> hidden states -> connector -> visual embeddings (aligned with a frozen encoder)
                                        |                              |
                                        +---- text ----> dual pathway <+
                                                              |
    images -> autoencoder -> latents, noised ------------> diffusion transformer -> velocity

Parameters are one dict keyed by part: `vlm, queries, connector, vision_target, conditioning, frames, dit, autoencoder`.
A stage holds only the parts that it uses; beside them stand `statistics`, constants measured on the data. B rows, L VLM
tokens, I frames of a row, N query tokens, T latent tokens, M clean ones, P values in a patch.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmcore_jax.bridge.conditioning import Condition, Drop, DualPathway, mean
from mmcore_jax.bridge.connector import make_connector
from mmcore_jax.bridge.frames import FrameEmbedding
from mmcore_jax.bridge.queries import LearnableQueries
from mmcore_jax.config import Execution, Model
from mmcore_jax.data.layout import Interleaved, Pairs
from mmcore_jax.diffusion import flow
from mmcore_jax.models import qwen_vl
from mmcore_jax.models.autoencoder import make_autoencoder
from mmcore_jax.models.mmdit import Memory, MMDiTModel, Slots
from mmcore_jax.models.qwen_vl import QwenVLModel
from mmcore_jax.models.siglip import SiglipModel
from mmcore_jax.nn import masks
from mmcore_jax.nn.layers import gather_tokens
from mmcore_jax.nn.masks import TokenMeta
from mmcore_jax.nn.patches import average_pool, patchify

Params = dict[str, Any]


class Beside(NamedTuple):
    """Clean tokens `[B, M, P]` that have to run along, since they see what is drawn, and their metadata."""

    tokens: jax.Array
    meta: TokenMeta


class MMCORE(nn.Module):
    """The composition of the parts of a stage."""

    config: Model
    execution: Execution

    def setup(self) -> None:
        model, run = self.config, self.execution
        if model.vlm:
            self.vlm = QwenVLModel(model.vlm, run)
            self.queries = LearnableQueries(model.queries, model.vlm.width)
            self.connector = make_connector(model.connector, run)
        if model.vision_target:
            self.vision_target = SiglipModel(model.vision_target, run)
        if model.dit:
            self.autoencoder = make_autoencoder(model.autoencoder, run)
            clean_width = model.dit.width if model.dit.clean_visual else 0
            places = model.queries.grid**2 if model.dit.query_positions else 0
            widths = model.dit.context_width, model.dit.pooled_width
            self.conditioning = DualPathway(*widths, run, clean_width, places)
            self.dit = MMDiTModel(model.dit, run)
            if model.frames:
                self.frames = FrameEmbedding(model.frames, model.dit.width, run)

    def __call__(self, batch: Interleaved | Pairs) -> None:
        """Runs every part once, so that `init` makes all parameters."""
        if isinstance(batch, Pairs):
            self.contrast(batch)
            return
        hidden = self.hidden_states(batch)
        self.logits(hidden)
        visual = self.visual_embeddings(hidden, batch)
        if self.config.vision_target:
            self.target_embeddings(batch.images.targets)
        if self.config.dit:
            nothing = jnp.zeros(batch.images.generated.shape, bool)
            text = self.text_embeddings(hidden, batch)
            images = self.image_embeddings(hidden, batch)
            condition = self.condition(text, visual, batch, Drop(nothing, nothing), images)
            clean = self.latents(batch.images.pixels)
            self.velocity(self.latent_tokens(clean, clean, batch), condition, jnp.zeros(nothing.shape), batch)
            self.autoencoder(batch.images.pixels)

    # --- VLM: multimodal context and queries to hidden states --------------------------------------------------------

    def hidden_states(self, batch: Interleaved) -> jax.Array:
        """Runs the VLM over text, images and queries: `[B, L, D]`, normed."""
        return self.vlm.decode(self.embed(batch), batch.tokens.meta, batch.tokens.positions)

    def embed(self, batch: Interleaved) -> jax.Array:
        """What the VLM's decoder is given of text, images and queries: `[B, L, D]`."""
        tokens, patches = batch.tokens, batch.patches
        values = qwen_vl.normalize(patches.values)
        return self.vlm.embed(tokens.ids, tokens.meta, tokens.source, values, patches.meta, self.queries())

    def logits(self, hidden_states: jax.Array) -> jax.Array:
        """Next-token logits `[..., V]`, float32."""
        return self.vlm.logits(hidden_states)

    def visual_embeddings(self, hidden_states: jax.Array, batch: Interleaved) -> jax.Array:
        """What the VLM predicts of each frame's image: `[B, I, N, D_visual]`; only generated frames have a meaning."""
        return self.connector(gather_tokens(hidden_states, batch.images.queries))

    # --- Vision target: what the visual embeddings are aligned with --------------------------------------------------

    def target_embeddings(self, pixels: jax.Array) -> jax.Array:
        """Patch features of images `[B, I, size, size, 3]`, average-pooled to the query grid.

        Returns float32 `[B, I, N, D_visual]`.
        """
        flat = pixels.reshape(-1, *pixels.shape[2:])
        features = self.vision_target.patch_features(flat).astype(jnp.float32)
        pooled = average_pool(features, self.config.queries.grid)
        return pooled.reshape(*pixels.shape[:2], *pooled.shape[1:])

    def contrast(self, batch: Pairs) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Unit embeddings of images and texts `[B, D]`, and logits of all pairs `[B, B]`."""
        return self.vision_target(batch.pixels, batch.ids, batch.valid)

    # --- Diffusion: text and visual embeddings to velocities ---------------------------------------------------------

    def text_embeddings(self, hidden_states: jax.Array, batch: Interleaved) -> jax.Array:
        """The hidden states of the text that stands in the context, `[B, C, D]`; only TEXT tokens have a meaning."""
        is_text = batch.diffusion.context_meta.kind == masks.TEXT
        return gather_tokens(hidden_states, jnp.where(is_text, batch.diffusion.context_source, 0))

    def image_embeddings(self, hidden_states: jax.Array, batch: Interleaved) -> jax.Array:
        """The mean hidden state over each image that the VLM sees, `[B, I, D]`; zero for others."""
        meta, frames = batch.tokens.meta, jnp.arange(batch.images.generated.shape[1])[:, None]
        members = (meta.frame[:, None] == frames) & (meta.kind == masks.IMAGE)[:, None]
        return mean(hidden_states, members)

    def condition(
        self, text: jax.Array, visual: jax.Array, batch: Interleaved, drop: Drop, images: jax.Array | None = None
    ) -> Condition:
        """What the diffusion transformer is conditioned on: each frame's text and visual embeddings."""
        meta, source = batch.diffusion.context_meta, batch.diffusion.context_source
        is_visual = meta.kind == masks.VISUAL
        flat = visual.reshape(visual.shape[0], -1, visual.shape[-1])
        source = jnp.where(is_visual, source, 0)
        query = source % self.config.queries.grid**2 if self.config.dit.query_positions else None
        return self.conditioning(text, gather_tokens(flat, source), meta, drop, images, query)

    def latents(self, pixels: jax.Array) -> jax.Array:
        """Images `[B, I, height, width, 3]` as patches of latents, float32 `[B, I, patches, P]`."""
        return patchify(self.autoencoder.encode(pixels), self.config.dit.patch_size)

    def latent_tokens(self, clean: jax.Array, noised: jax.Array, batch: Interleaved) -> jax.Array:
        """Gathers `[B, I, patches, P]` of either kind into the diffusion sequence `[B, T, P]`."""
        meta, source = batch.diffusion.latent_meta, batch.diffusion.latent_source
        both = jnp.concatenate([clean, noised], axis=1)
        both = both.reshape(both.shape[0], -1, both.shape[-1])
        return gather_tokens(both, source + jnp.where(meta.kind == masks.NOISED, both.shape[1] // 2, 0))

    def remember(
        self, tokens: jax.Array, meta: TokenMeta, number: jax.Array, clean: jax.Array | None = None
    ) -> Memory | Beside:
        """What clean tokens `[B, M, P]` are to noised ones: the same at every timestep and under every condition.

        `number` `[B, I]` is that of the images in their documents, `clean` that of any condition.
        """
        if self.config.dit.visibility == "full":
            return Beside(tokens, meta)
        t = jnp.zeros((tokens.shape[0], 1))
        width = self.config.dit.pooled_width
        pooled = jnp.zeros((*t.shape, width)) if width else None
        return self.dit.remember(tokens, t, meta, self._rule, pooled, self._added(meta, number, clean))

    def _added(self, meta: TokenMeta, number: jax.Array, clean: jax.Array | None) -> jax.Array | None:
        """What the embedded patches are told, `[B, T, D]`: which image they are of, and what clean ones look like."""
        told = [each for each in (self.identity(meta, number), _of_clean_tokens(clean, meta)) if each is not None]
        return sum(told) if told else None

    def identity(self, meta: TokenMeta, number: jax.Array) -> jax.Array | None:
        """Which image of its document each latent token is of, `[B, T, D]`; a frame that stands alone is its first."""
        if not self.config.frames:
            return None
        return self.frames(jnp.where(meta.document < 0, 0, jnp.take_along_axis(number, meta.frame, axis=1)))

    def velocity(
        self,
        tokens: jax.Array,
        condition: Condition,
        t: jax.Array,
        batch: Interleaved,
        memory: Memory | Beside | None = None,
    ) -> jax.Array:
        """The velocity of every latent token, float32 `[B, T, P]`.

        Args:
          tokens: `[B, T, P]`.
          condition: of every frame.
          t: `[B, I]`, timestep of each frame's noised copy; clean copies are at 0, and see no pooled condition.
          batch: says what the tokens are.
          memory: of clean tokens that are not among `tokens`.
        """
        meta, context_meta = batch.diffusion.latent_meta, condition.meta or batch.diffusion.context_meta
        if isinstance(memory, Beside):
            part = batch.diffusion._replace(latent_meta=masks.concatenate(meta, memory.meta))
            both = jnp.concatenate([tokens, memory.tokens], axis=1)
            return self.velocity(both, condition, t, batch._replace(diffusion=part))[:, : tokens.shape[1]]
        if condition.alone is not None:
            meta, context_meta = (masks.alone(each, condition.alone) for each in (meta, context_meta))
        timesteps = jnp.concatenate([t, jnp.zeros_like(t[:, :1])], axis=1)
        slots = Slots(context_meta.frame, jnp.where(meta.kind == masks.NOISED, meta.frame, t.shape[1]))
        pooled = None if condition.pooled is None else jnp.pad(condition.pooled, ((0, 0), (0, 1), (0, 0)))
        given = tokens, condition.context, timesteps, slots, meta, context_meta, self._rule, pooled, memory
        prediction = self.dit(*given, self._added(meta, batch.images.number, condition.clean))
        t_tokens = gather_tokens(timesteps, slots.latents)[..., None]
        return flow.to_velocity(prediction, tokens, t_tokens, self.config.dit.prediction)

    @property
    def _rule(self) -> masks.Rule:
        return masks.DIFFUSION_RULES[self.config.dit.visibility]


def _of_clean_tokens(clean: jax.Array | None, meta: TokenMeta) -> jax.Array | None:
    """Of each frame's `[B, I, D]` what its clean tokens get, `[B, T, D]`; the noised ones get zero."""
    return None if clean is None else (meta.kind == masks.CLEAN)[..., None] * gather_tokens(clean, meta.frame)


class Forward:
    """One batch through the model: what several objectives need is computed once, and not where the batch brings it."""

    def __init__(self, model: MMCORE, params: Params, batch: Interleaved | Pairs) -> None:
        self.model, self.params, self.batch = model.bind({"params": params}), params, batch

    @functools.cached_property
    def hidden_states(self) -> jax.Array:
        return self.model.hidden_states(self.batch)

    @functools.cached_property
    def visual_embeddings(self) -> jax.Array:
        given = self.batch.features.visual
        return self.model.visual_embeddings(self.hidden_states, self.batch) if given is None else given

    @functools.cached_property
    def text_embeddings(self) -> jax.Array:
        given = self.batch.features.text
        return self.model.text_embeddings(self.hidden_states, self.batch) if given is None else given

    @functools.cached_property
    def image_embeddings(self) -> jax.Array | None:
        wanted = self.model.config.dit.clean_visual
        return self.model.image_embeddings(self.hidden_states, self.batch) if wanted else None

    @functools.cached_property
    def latents(self) -> jax.Array:
        given = self.batch.features.latents
        return self.model.latents(self.batch.images.pixels) if given is None else given

    @functools.cached_property
    def target_embeddings(self) -> jax.Array:
        given = self.batch.features.targets
        return self.model.target_embeddings(self.batch.images.targets) if given is None else given

    @functools.cached_property
    def target_mean(self) -> jax.Array:
        """`[N, D_visual]`, the mean of the target embeddings over the dataset."""
        return self.params["statistics"]["target_mean"]

    @functools.cached_property
    def targets(self) -> jax.Array:
        """Target embeddings `[B, I, N, D_visual]`, centred."""
        return self.target_embeddings - self.target_mean
