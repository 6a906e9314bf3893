"""Images become what the published processors make of them, on a photograph in odd sizes."""

import io
import json

import matplotlib.cbook
import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmcore_jax import config
from mmcore_jax.config import UserError
from mmcore_jax.data import example
from mmcore_jax.data import image as image_lib
from mmcore_jax.data.example import BadExample
from mmcore_jax.data.geometry import Geometry
from mmcore_jax.models import qwen_vl
from mmcore_jax.nn.masks import IMAGE
from tests import rows

with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
    PHOTOGRAPH = Image.open(file).convert("RGB")  # 512 x 600
# (left, top, right, bottom): the whole, odd sizes, narrow ones, and some that have to grow.
CROPS = [(0, 0, 512, 600), (3, 5, 480, 398), (100, 50, 377, 599), (0, 200, 512, 237), (250, 100, 281, 131)]
CROPS += [(9, 9, 16, 600)]


@pytest.fixture
def directory(tmp_path):
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("box", CROPS)
@pytest.mark.parametrize("max_pixels", [28 * 28 * 1280, 28 * 28 * 60])
def test_pixel_values_are_those_of_the_published_processor(box, max_pixels, tmp_path, record_property):
    theirs = Qwen2VLImageProcessorPil(max_pixels=max_pixels)
    theirs.save_pretrained(tmp_path)
    crop = PHOTOGRAPH.crop(box)
    expected = theirs(crop, return_tensors="np")
    values, grid = image_lib.pixel_values(crop, image_lib.load_processor(tmp_path))
    np.testing.assert_array_equal([grid], expected["image_grid_thw"])
    found = float(np.abs(values - expected["pixel_values"]).max())
    record_property("max_difference", found)
    assert values.dtype == np.float32
    assert found < 1e-5


def test_older_settings_are_read(directory):
    path = directory / "preprocessor_config.json"
    newer = image_lib.load_processor(directory)
    given = json.loads(path.read_text())
    limits = given.pop("size")
    path.write_text(json.dumps(given | {"min_pixels": limits["shortest_edge"], "max_pixels": limits["longest_edge"]}))
    assert image_lib.load_processor(directory) == newer
    assert newer.patch_size == 14
    assert (newer.min_pixels, newer.max_pixels) == (56 * 56, 28 * 28 * 1280)


def test_settings_that_are_within_those_of_the_whole_processor(directory):
    """As transformers 5 saves them."""
    path, expected = directory / "preprocessor_config.json", image_lib.load_processor(directory)
    whole = {"image_processor": json.loads(path.read_text()), "processor_class": "Qwen2_5_VLProcessor"}
    path.unlink()
    (directory / "processor_config.json").write_text(json.dumps(whole))
    assert image_lib.load_processor(directory) == expected


def test_the_older_limits_count_more(directory):
    """As to transformers, where both are given."""
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_pixels": 1_003_520, "min_pixels": None}))
    found = image_lib.load_processor(directory)
    assert (found.min_pixels, found.max_pixels) == (56 * 56, 1_003_520)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(temporal_patch_size=1), "is not of a Qwen2.5-VL"),
        (dict(resample=2), "is not of a Qwen2.5-VL"),
        (dict(image_mean=None), "lacks a setting"),
        (dict(size={}), "lacks a setting"),
    ],
)
def test_settings_of_another_processor(directory, change, message):
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        image_lib.load_processor(directory)


def test_a_missing_processor(tmp_path):
    with pytest.raises(UserError, match=r"preprocessor_config.json does not exist"):
        image_lib.load_processor(tmp_path)


def test_sizes_are_those_of_the_published_processor():
    rng = np.random.default_rng(0)
    smart_resize = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.smart_resize
    for height, width in rng.integers(10, 3000, (500, 2)).tolist():
        limits = dict(factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
        if max(height, width) > 200 * min(height, width):
            continue
        assert image_lib.smart_resize(height, width, **limits) == smart_resize(height, width, **limits)
    with pytest.raises(BadExample, match="200 times"):
        image_lib.smart_resize(1, 201, **limits)


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("box", CROPS[:5])
def test_siglip_sees_what_its_published_processor_gives(box, resample, record_property):
    crop = PHOTOGRAPH.crop(box)
    theirs = SiglipImageProcessorPil(size={"height": 224, "width": 224}, resample=resample)
    expected = theirs(crop, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = image_lib.resize(crop, 224, 224, resample).astype(np.float32) / 127.5 - 1  # as models/siglip.py has it
    found = float(np.abs(ours - expected).max())
    record_property("max_difference", found)
    assert found < 1e-5


@pytest.mark.parametrize("box", CROPS)
def test_training_sees_what_the_published_processor_gives(box):
    """The uint8 patches of a row, normalised on the device, are the values that the published network is given."""
    least, most = 56 * 56, 28 * 28 * 60
    buffer = io.BytesIO()
    PHOTOGRAPH.crop(box).save(buffer, "PNG")
    document = {"id": "", "task": "", "segments": [example.image(buffer.getvalue()), example.text("a", "assistant")]}
    sizes = Geometry(
        (least, most), 14, 2, query_grid=2, target_size=0, buckets=((1, 1),), latent_patch=0, latent_capacity=0
    )
    budgets = config.Budgets(vlm_tokens=128, vision_patches=240, context_tokens=0, latent_tokens=0, images=1)
    row = rows.pack(document, budgets=budgets, sizes=sizes)

    vision = config.QwenVision(8, 1, 1, 8, 14, 2, 112, ())
    c = config.QwenVL(8, 1, 1, 8, 200, 1, (1, 1, 2), 1e4, 1e-6, True, vision)
    published = Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=most)(PHOTOGRAPH.crop(box), return_tensors="np")
    ids = np.full((1, len(published["pixel_values"]) // 4), 5)
    prompts = qwen_vl.prepare(c, ids, np.ones_like(ids), **published, image_token=5)
    used = row.patches.meta.kind[0] == IMAGE
    np.testing.assert_allclose(qwen_vl.normalize(row.patches.values[0, used]), prompts.patches[0], atol=1e-5)
    for ours, theirs in zip((row.patches.meta.row, row.patches.meta.col), prompts.patch_meta[3:5]):
        np.testing.assert_array_equal(ours[0, used], theirs[0])


def test_another_processor_is_refused(directory):
    vision = config.QwenVision(8, 1, 1, 8, 14, 2, 112, ())
    image_lib.check_processor(directory, vision)
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(image_mean=[0.5, 0.5, 0.5])))
    with pytest.raises(UserError, match=r"has mean \(0.5, 0.5, 0.5\), but images are prepared with"):
        image_lib.check_processor(directory, vision)


def test_transparency_is_over_white():
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(buffer, "PNG")
    assert np.asarray(image_lib.open_rgb(buffer.getvalue())).min() == 255
    assert image_lib.decode(buffer.getvalue(), 4).min() == 255


# Height and width: fewer of both, many fewer, divisors, more of one; an image that Pillow keeps in pieces; and a part.
SCALES = [((600, 512), (384, 384), None), ((600, 512), (33, 47), None), ((600, 512), (200, 256), None)]
SCALES += [((600, 512), (700, 300), None), ((2400, 2401), (77, 384), None), ((600, 700), (384, 384), (51, 2, 649, 600))]


@pytest.mark.parametrize(("size", "wanted", "box"), SCALES)
def test_large_images_are_resized_as_pillow_does_it_but_for_rounding(size, wanted, box, record_property):
    image = PHOTOGRAPH.resize(size[::-1])
    resample = Image.Resampling.BOX if wanted == (200, 256) else Image.Resampling.BICUBIC
    expected = np.asarray(image.resize(wanted[::-1], resample, box)).astype(int)

    def error(found: np.ndarray) -> float:
        return float(np.sqrt(np.mean((found - expected) ** 2)))

    found = error(image_lib.scale(image, *wanted, box))
    record_property("levels", found)
    assert found < 1.0
    assert error(np.asarray(image.resize(wanted[::-1], Image.Resampling.BILINEAR, box))) > 1.5 * found
    if box:
        assert error(image_lib.scale(image, *wanted)) > 10 * found


@pytest.mark.parametrize(("size", "wanted"), [((200, 200), (100, 50)), ((200, 200), (96, 96))])
def test_small_images_are_resized_by_pillow(size, wanted):
    image, box = PHOTOGRAPH.resize(size), (20, 0, 120, 100)
    part = image.crop(box)
    expected = part.reduce((2, 1)) if wanted == (100, 50) else part.resize(wanted[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(image_lib.scale(image, *wanted, box), expected)
