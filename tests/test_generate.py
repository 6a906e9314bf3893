"""Sampling through all rooms, on random weights: what is reused between steps changes nothing."""

import dataclasses
import functools
import io
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmcore_jax.bridge.conditioning import Drop
from mmcore_jax.config import UserError
from mmcore_jax.data import example as example_lib
from mmcore_jax.data import geometry, layout, packing
from mmcore_jax.data.text import load_tokenizer
from mmcore_jax.diffusion import flow, guidance, solver
from mmcore_jax.generate import Generator, default_size, denoise, fit, negate, noise_keys, prepare, split
from mmcore_jax.mmcore import MMCORE, Forward
from mmcore_jax.nn import attention, masks
from mmcore_jax.nn.layers import gather_tokens
from mmcore_jax.nn.masks import NOISED
from mmcore_jax.nn.patches import unpatchify
from tests import tiny

PICTURES = [tiny.drawing(colour, shape) for colour in tiny.COLOURS for shape in tiny.SHAPES]
TOLD = ["model.dit.depth=4", "model.dit.dual_layers=2", "model.frames={'count': 4}"]
NETWORKS = {
    "looped": TOLD,
    "unrolled": ["model.dit.depth=4", "model.dit.dual_layers=2", "execution.scan_layers=False"],
    "clean_visual": [*TOLD, "model.dit.clean_visual=True"],
    "full": [*TOLD, "model.dit.clean_visual=True", "model.dit.visibility=full"],
    "blockwise": ["model.dit.pooled_width=0", "model.dit.position=rotary", "execution.attention=blockwise"],
}


def load(data, *overrides):
    """A tiny stage 2 of which every parameter is random: zero-initialised ones would hide everything."""
    config = tiny.config("stage2", data, "--config.sampling.steps=2", *(f"--config.{each}" for each in overrides))
    model, rng = MMCORE(config.model, config.execution), np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), packing.placeholder(config)))["params"]
    params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    params["dit"]["out"] = jax.tree.map(lambda leaf: leaf / 5, params["dit"]["out"])  # most colours are not clipped
    if config.model.dit.pooled_width:  # the scale of a norm is about one
        params["conditioning"]["pooled_norm"]["scale"] *= 5
    return config, model, params


def request(inputs, words="make it red"):
    """Draws after the words, from the images `inputs`."""
    segments = [*map(example_lib.image, inputs), example_lib.text(words), example_lib.image(b"to come", generate=True)]
    return {"id": words, "task": "test", "segments": segments}


def batch_of(config, requests):
    """One request a row."""
    chat = layout.ChatFormat(load_tokenizer(config.data.tokenizer))
    sizes = geometry.derive(config.model, config.data)
    rows = [[prepare(one, chat, sizes)] for one in requests]
    return packing.assemble(rows, 0, fit([item for [(item, _)] in rows], sizes), sizes)


def test_text_alone(data):
    """A batch without an input image has no vision patches; each image is that of a batch which has some."""
    config, model, params = load(data)
    generator = Generator(config, model, load_tokenizer(config.data.tokenizer))

    def generate(*requests):
        return generator(params, requests, config.sampling).astype(int)

    tasks = tiny.examples()
    first, second, edit = tasks["text_to_image"][0], tasks["text_to_image"][1], tasks["edit_colour"][0]
    alone = generate(first, second)
    assert alone.shape == (2, 16, 16, 3)
    assert alone.std() > 1
    assert np.abs(alone - generate(second, first)).max() > 10, "the text does not matter"
    mixed = generate(first, second, edit)
    assert np.abs(alone - mixed[:2]).max() <= 1
    assert np.abs(mixed[0] - mixed[1]).max() > 10


def test_any_size(data):
    """Requests of two sizes in one call; what is not said follows from the first image, here 16 x 32 pixels."""
    config, model, params = load(data, "data.aspect_ratios=(1.0,2.0)", "model.dit.position_grid=8")
    generator = Generator(config, model, load_tokenizer(config.data.tokenizer))
    file = io.BytesIO()
    Image.open(io.BytesIO(PICTURES[0])).resize((32, 16)).save(file, "PNG")
    requests = [request([], "wide"), request([file.getvalue(), PICTURES[1]])]
    assert [default_size(one, config) for one in requests] == [(16, 16), (12, 20)]
    images = generator(params, requests, config.sampling, seed=[1, 2], sizes=[(8, 16), (12, 20)])
    assert [image.shape for image in images] == [(8, 16, 3), (12, 20, 3)]
    assert min(image.std() for image in images) > 1
    by_default = generator(params, requests[1:2], config.sampling, seed=[2])
    assert np.abs(by_default.astype(int) - images[1]).max() <= 1
    assert generator.nearest_size(file.getvalue()) == (12, 20)
    for size, words in (((8, 15), "8x15 must be a multiple of 4"), ((4, 36), "4x36 makes 9 .*position_grid 8")):
        with pytest.raises(UserError, match=f"the size {words}"):
            generator(params, requests[:1], config.sampling, sizes=[size])


def test_larger_pictures_stay_longer_in_noise(data, monkeypatch):
    """Of patches of 4 pixels there are 8 and 15."""
    shifts, timesteps = [], solver.timesteps
    monkeypatch.setattr(solver, "timesteps", lambda *given: shifts.append(given[1]) or timesteps(*given))
    config, model, params = load(data, "model.dit.position_grid=8")
    generator = Generator(config, model, load_tokenizer(config.data.tokenizer))
    settings = dataclasses.replace(config.sampling, steps=1, timestep_shift=3.0, timestep_shift_tokens=8)
    generator(params, [request([], "wide")] * 2, settings, sizes=[(8, 16), (12, 20)])
    np.testing.assert_allclose(shifts, [3.0, 3.0 * (15 / 8) ** 0.5])


def test_settings_reach_the_picture(data):
    """The solver, and guidance in its interval and with its norm; each is proven in tests/diffusion."""
    config, model, params = load(data)
    generator, requests = Generator(config, model, load_tokenizer(config.data.tokenizer)), [request(PICTURES[:1])]

    def generate(**settings):
        base = dict(steps=8, text_scale=1.0, visual_scale=1.0)
        images = generator(params, requests, dataclasses.replace(config.sampling, **base | settings))
        return images.astype(int)

    plain = generate()
    pictures = [generate(solver=name) for name in solver.SOLVERS]
    assert (pictures[0] == plain).all()
    assert all((picture != plain).any() for picture in pictures[1:])
    guided = dict(text_scale=3.0, visual_scale=3.0)
    assert np.abs(generate(**guided) - plain).mean() > 5
    assert np.abs(generate(**guided, guidance_interval=(0.0, 0.0)) - plain).max() <= 1
    assert np.abs(generate(**guided, renormalisation=1.0) - generate(**guided)).mean() > 1
    assert np.abs(generate(image_scale=3.0) - plain).mean() > 1


# --- Reuse ------------------------------------------------------------------------------------------------------------


def plain(model, params, batch, branches, keys, timesteps, negated=None, given=()):
    """What `denoise` returns, where every step and branch runs all tokens.

    Those of the rows `given` that drop the text run instead on the requests `negated`, whose text they keep.
    """
    forward, shape = Forward(model, params, batch), batch.images.generated.shape
    clean = forward.model.latents(batch.images.pixels)
    noise = [jax.random.normal(key, clean.shape[1:]) for key in keys]
    tokens = forward.model.latent_tokens(clean, jnp.stack(noise), batch)
    noised = batch.diffusion.latent_meta.kind == NOISED

    @jax.jit
    def velocity(params, tokens, batch, visual, images, drop, t):
        forward = Forward(model, params, batch)
        condition = forward.model.condition(forward.text_embeddings, visual, batch, drop, images)
        return forward.model.velocity(tokens, condition, jnp.full(shape, t), batch)

    def of_branch(tokens, dropped, t):
        drop = Drop(*(jnp.full(shape, each) for each in dropped))
        if negated is None or not dropped[0]:
            return velocity(params, tokens, batch, *seen, drop, t)
        drop = drop._replace(text=~given[:, None] & drop.text)
        return velocity(params, tokens, negated, *seen, drop, t)

    seen = forward.visual_embeddings, forward.image_embeddings
    for now, later in itertools.pairwise(timesteps):
        velocities = [of_branch(tokens, dropped, now) for dropped in zip(*branches[:3])]
        guided = sum(weight * each for weight, each in zip(branches.weight, velocities))
        tokens += (later - now) * noised[..., None] * guided
    patches = jnp.stack([row[chosen] for row, chosen in zip(tokens, noised)])
    size = batch.images.pixels.shape[-2] // model.config.autoencoder.downsampling
    return forward.model.autoencoder.decode(unpatchify(patches, model.config.dit.patch_size, size, size))


def of_another_request(remember):
    return lambda self, tokens, *rest: remember(self, jnp.roll(tokens, 1, axis=0), *rest)


def left_out(remember):
    return lambda *given: None


def not_dropped(alone):
    return lambda meta, frames: meta


BROKEN = ((MMCORE, "remember", of_another_request), (MMCORE, "remember", left_out), (masks, "alone", not_dropped))


@pytest.mark.parametrize("network", NETWORKS)
def test_reuse_changes_no_picture(data, network, monkeypatch):
    """Nor the mixture of a batch: requests give 1, 0, 4 and 2 images. All four branches of guidance run."""
    monkeypatch.setattr(attention, "BLOCK", 16)
    config, model, params = load(data, *NETWORKS[network])
    counts = np.array([1, 0, 4, 2])
    batch = batch_of(config, [request(PICTURES[count : 2 * count]) for count in counts])
    inputs = (
        guidance.branches("both", 2.0, 1.5, 1.75),
        noise_keys(3, len(batch.row)),
        solver.timesteps(3, 3.0, "trailing"),
    )

    def differences():
        """Of each row, the largest."""
        traced = functools.partial(denoise, model, settings=config.sampling)  # each time
        images = jax.jit(traced)(params, *split(batch), *inputs)
        return np.abs(images - expected).max(axis=(1, 2, 3))

    expected = plain(model, params, batch, *inputs)
    assert ((expected > 0) & (expected < 1)).mean() > 0.5
    assert differences().max() < 1e-4
    for owner, name, broken in BROKEN:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken(getattr(owner, name)))
            found = differences()
        assert (found[counts > 0] > 0.01).all()
        assert (found[counts == 0] < 1e-4).all()


def test_negative_prompts(data):
    """Of two requests in three: guidance leads away from what the VLM makes of the same images and these words."""
    config, model, params = load(data)
    generator = Generator(config, model, load_tokenizer(config.data.tokenizer))
    requests = [request(PICTURES[:2]), request([]), request(PICTURES[3:4], "a dot")]
    negatives = ["a blue bar and a green one", None, "black"]
    scales = dict(text_scale=3.0, visual_scale=2.0, image_scale=1.5)
    settings = dataclasses.replace(config.sampling, **scales)

    def generate(negatives, chosen=slice(None), **changes):
        changed = dataclasses.replace(settings, **changes)
        return generator(params, requests[chosen], changed, [5, 6, 7][chosen], negatives=negatives).astype(int)

    found = generate(negatives)
    words = [negative or "make it red" for negative in negatives]
    images = [PICTURES[:2], [], PICTURES[3:4]]
    negated, given = batch_of(config, [*map(request, images, words)]), np.array([True, False, True])
    timesteps = solver.timesteps(2, settings.timestep_shift, settings.timestep_spacing)
    inputs = guidance.branches("both", 3.0, 2.0, 1.5), noise_keys([5, 6, 7], 3), timesteps
    expected = plain(model, params, batch_of(config, requests), *inputs, negated, given)
    assert np.abs(found - 255 * expected).max() <= 1
    without = np.abs(found - generate(None)).max(axis=(1, 2, 3))
    assert (without[given] > 10).all()
    assert without[1] <= 1
    with pytest.raises(UserError, match="a negative prompt needs the text pathway"):
        generator(params, requests[:1], settings, pathways="visual", negatives=negatives[:1])
    alone = generate(negatives[:1], slice(1))
    assert np.abs(alone - found[:1]).max() <= 1
    own = generate(["make it red"], slice(1), visual_scale=1.0, image_scale=1.0)
    unguided = generate(None, slice(1), text_scale=1.0, visual_scale=1.0, image_scale=1.0)
    assert np.abs(own - unguided).max() <= 1


def test_what_a_negative_prompt_replaces():
    """The words for the image to come, those that stand before a given image too; not what came of earlier words."""
    image, text = example_lib.image, example_lib.text
    turn = [text("one"), image(b"drawn", generate=True)]
    segments = [*turn, text("two"), image(b"given"), text("three"), image(b"to come", generate=True)]
    negated = negate({"id": "x", "task": "test", "segments": segments}, "four")
    assert negated["segments"] == [*turn, image(b"given"), text("four"), image(b"to come", generate=True)]


def test_visible_history_conditions_the_next_image(data):
    """Only by an image that was generated itself: what is merely given has no visual embeddings.

    In a conversation too, where the same request comes twice.
    """
    config, _, params = load(data)
    told = dataclasses.replace(config.model, dit=dataclasses.replace(config.model.dit, visibility="history_visual"))
    others = dataclasses.replace(config, model=told)
    tokenizer = load_tokenizer(config.data.tokenizer)
    generators = [
        Generator(each, MMCORE(each.model, each.execution), tokenizer, converses=True) for each in (config, others)
    ]
    given = request(PICTURES[:2])
    drawn = {**given, "segments": [{**given["segments"][0]}, {**given["segments"][1], "generate": True}]}
    drawn["segments"] += given["segments"][2:]
    without, with_history = (
        [generator(params, [one], config.sampling)[0].astype(int) for one in (given, drawn, drawn)]
        for generator in generators
    )
    assert np.abs(without[0] - with_history[0]).max() <= 1
    assert np.abs(without[1] - with_history[1]).max() > 5
    assert np.abs(with_history[1] - with_history[2]).max() <= 1


@pytest.mark.parametrize(
    ("network", "alone"),
    [("looped", [False] * 3), ("looped", [False, True, False]), ("clean_visual", [False, True, False])],
)
def test_training_is_sampling(data, network, alone):
    """Frames of a document that are trained at once have the velocities of frames that are asked for one by one.

    So has one that loses its condition images, between two that do not.
    """
    config, model, params = load(data, *NETWORKS[network])
    segments = [example_lib.image(PICTURES[0])]
    for number in range(1, 4):
        segments += [example_lib.text(f"number {number}"), example_lib.image(PICTURES[number], generate=True)]
    document = {"id": "four", "task": "test", "segments": segments}
    chat = layout.ChatFormat(load_tokenizer(config.data.tokenizer))
    sizes = geometry.derive(config.model, config.data)
    item = layout.make_item(document, chat, sizes)
    pictures = [layout.picture(frame, sizes) for frame in item.frames]
    batch = packing.assemble([[(item, pictures)]], 0, fit([item], sizes), sizes)
    t = jnp.array([[0.0, 0.9, 0.6, 0.3]])

    def condition(forward, batch, alone):
        nothing = jnp.zeros(batch.images.generated.shape, bool)
        states = forward.text_embeddings, forward.visual_embeddings
        return forward.model.condition(*states, batch, Drop(nothing, nothing, alone), forward.image_embeddings)

    @jax.jit
    def trained(params):
        forward = Forward(model, params, batch)
        clean = forward.model.latents(batch.images.pixels)
        noised = flow.interpolate(clean, jax.random.normal(jax.random.key(0), clean.shape), t[..., None, None])
        tokens = forward.model.latent_tokens(clean, noised, batch)
        given = condition(forward, batch, np.array([[False, *alone]]))
        return noised[0, 1:], forward.model.velocity(tokens, given, t, batch)

    @jax.jit
    def sampled(params, tokens):
        whole = batch_of(config, [{**document, "segments": segments[:end]} for end in (3, 5, 7)])
        batch, clean = split(whole)
        forward = Forward(model, params, batch)
        latents = forward.model.latents(batch.images.pixels)
        latents = gather_tokens(latents.reshape(3, -1, latents.shape[-1]), clean.latent_source)
        given = condition(forward, batch, np.tile(alone, (4, 1)).T), jnp.tile(t, (3, 1)), batch
        memory = forward.model.remember(latents, clean.latent_meta, batch.images.number, given[0].clean)
        return [forward.model.velocity(tokens, *given, memory=each) for each in (memory, None)]

    noised, velocities = trained(params)
    meta = batch.diffusion.latent_meta
    expected = np.stack([velocities[(meta.kind == NOISED) & (meta.frame == frame)] for frame in (1, 2, 3)])
    found, forgetful = sampled(params, noised)
    assert (expected.std(axis=(1, 2)) > 0.1).all()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    missed = np.abs(forgetful - expected).max(axis=(1, 2))
    np.testing.assert_array_equal(missed > 0.01, np.logical_not(alone))
    assert (missed[alone] < 1e-5).all()
