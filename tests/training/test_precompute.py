"""Features that are computed once serve training as those computed in every step do, and no others are read."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mmcore_jax import prepare, sharding
from mmcore_jax.config import Config, UserError
from mmcore_jax.data import example as example_lib
from mmcore_jax.data import features, geometry, layout, packing
from mmcore_jax.data.pipeline import Batches
from mmcore_jax.data.reader import Reader
from mmcore_jax.mmcore import MMCORE
from mmcore_jax.training.precompute import precompute, weights
from mmcore_jax.training.state import Constants, create_state, freeze, make_plan, random_params
from mmcore_jax.training.step import make_step
from tests import tiny

STAGE1 = tiny.REPOSITORY / "configs/stage1.py"
INIT = ("vlm", "queries", "connector", "vision_target")
KINDS = {"stage1": ("targets",), "stage2": ("latents", "conditioning")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("features") / "data")


@pytest.fixture
def own_data(data, tmp_path):
    return shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("index"))


class Setting:
    """A tiny stage with random weights, and its frozen ones."""

    def __init__(self, stage: str, directory, kinds: tuple[str, ...], *extra: str) -> None:
        self.config: Config = tiny.config(stage, directory, f"--config.data.features={kinds!r}", *extra)
        self.mesh = sharding.make_mesh(self.config.mesh, jax.devices()[:1])
        self.model, example = MMCORE(self.config.model, self.config.execution), packing.placeholder(self.config)
        self.plan = make_plan(self.config, self.model, self.mesh, example)
        self.params = random_params(self.config, self.model, self.plan, example, list(self.plan.shapes))
        self.frozen = freeze(self.config, self.plan, self.params)

    def precompute(self, share: tuple[int, int] = (0, 1)) -> dict[str, str]:
        return precompute(self.config, self.model, self.plan, self.frozen, self.mesh, lambda items, *_: items, share)

    def batches(self) -> Batches:
        return Batches(self.config, weights=self.precompute())

    def step(self, batch: layout.Interleaved) -> dict[str, float]:
        statistics = {"target_mean": np.zeros((4, 32), np.float32)} if self.config.objectives.alignment else {}
        state = create_state(self.config, self.plan, self.mesh, self.params)
        step = make_step(self.config, self.model, self.plan)
        _, metrics = jax.jit(step)(state, Constants(self.frozen, statistics), batch)
        return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("stage", KINDS)
def test_a_step_is_the_same_with_features(stage, data):
    given, computed = Setting(stage, data, KINDS[stage]), Setting(stage, data, ())
    with_features, without = given.batches()[0].arrays, computed.batches()[0].arrays
    for name in (name for kind in KINDS[stage] for name in features.FIELDS[kind]):
        assert np.any(getattr(with_features.features, name)), name
    assert with_features.images.targets.size == 0
    if stage == "stage2":
        assert with_features.images.pixels.size == with_features.patches.values.size == 0
    expected, found = computed.step(without), given.step(with_features)
    assert found == pytest.approx(expected, rel=1e-5)

    swapped = jax.tree.map(lambda x: x[::-1].copy(), with_features.features)  # those of other examples
    assert given.step(with_features._replace(features=swapped))["loss"] != pytest.approx(expected["loss"], rel=1e-3)


def test_other_weights_make_other_features(own_data):
    one, other = (Setting("stage1", own_data, ("targets",), f"--config.seed={seed}") for seed in (0, 1))
    made_by = one.precompute()
    assert made_by == Setting("stage1", own_data, ("targets",), "--config.total_steps=7").precompute()
    with pytest.raises(UserError, match="'targets', which was made by other weights or data"):
        Reader(other.config, {"targets": "others"})
    assert other.precompute() != made_by
    found = [setting.batches()[0].arrays.features.targets for setting in (one, other)]
    assert not np.allclose(*found)


def test_what_is_missing_is_made_and_nothing_else(own_data, monkeypatch):
    monkeypatch.setattr("mmcore_jax.data.features.CHUNK", 5)
    monkeypatch.setattr("mmcore_jax.training.precompute.CHUNK", 5)
    setting = Setting("stage2", own_data, ("conditioning",))
    setting.precompute((0, 2))
    with pytest.raises(UserError, match=r"is not complete in .*: run python -m mmcore_jax.prepare --config="):
        Reader(setting.config, features_of(setting))
    setting.precompute((1, 2))
    files = sorted((own_data / "index").glob("*-conditioning-*/*.arrow"))
    assert len(files) == 3 * 5  # 12 examples of each of 5 sources
    times = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()
    setting.precompute()
    assert {path for path in files if path.stat().st_mtime_ns != times[path]} == {files[1]}


def features_of(setting: Setting) -> dict[str, str]:
    return weights(setting.config, setting.plan, setting.frozen)


def test_door(own_data, monkeypatch, capsys):
    def enter(*arguments: str) -> tuple[int, str]:
        given = [*tiny.overrides("stage1", own_data), *(f"--config.init.{part}=random" for part in INIT)]
        monkeypatch.setattr("sys.argv", ["prepare", f"--config={STAGE1}", *given, *arguments])
        with pytest.raises(SystemExit) as end:
            prepare.main()
        said = capsys.readouterr()
        return end.value.code, said.out + said.err

    assert enter("--features", "--part=1/2")[0] == 0
    assert not list((own_data / "index").glob("*-targets-*"))  # the only file of each source is another's part
    code, said = enter("--features")
    assert (code, len(list((own_data / "index").glob("*-targets-*/000000.arrow")))) == (0, 9)
    assert "targets by the weights" in said
    assert "'2/2' is not I/N with I from 0 to N - 1" in enter("--features", "--part=2/2")[1]
    assert "config.data.features of stage1 openmoji is empty" in enter("--features", "--config.data.features=()")[1]


def test_equal_images_are_looked_at_once(own_data, monkeypatch):
    given, put = [], sharding.shard_batch
    monkeypatch.setattr(sharding, "shard_batch", lambda batch, mesh: given.append(batch) or put(batch, mesh))
    Setting("stage2", own_data, ("latents",)).precompute()
    assert len(given) == 5 * 2  # at most 12 different images in each source, 8 a batch, of twice as many


def test_examples_that_cannot_be_used_keep_their_reason(own_data, monkeypatch):
    broken = tiny.drawing("red", "square")
    broken = broken[:-20] + bytes(20)
    setting = Setting("stage1", own_data, ("targets",), "--config.data.bad_record_limit=0.9")
    made = tiny.examples()["text_to_image"]
    made[3]["segments"][-1]["image"] = broken
    path = own_data / "text_to_image-train-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for item in made:
        writer.write(example_lib.encode(item))
    writer.close()
    reader = Reader(setting.config, setting.precompute())
    number = list(setting.config.data.sources).index("text_to_image")
    with pytest.raises(example_lib.BadExample) as online:
        Reader(setting.config).prepare(number, 3)
    with pytest.raises(example_lib.BadExample, match=re.escape(str(online.value))):
        reader.prepare(number, 3)
    assert reader.prepare(number, 4).images[0].features.targets is not None


@pytest.mark.parametrize(
    ("stage", "kinds", "extra", "sentence"),
    [
        ("stage1", ("conditioning",), (), "leaves out the VLM, but config.objectives needs it"),
        ("stage1", ("latents",), (), "has 'latents', but config.model.autoencoder is None"),
        ("stage2", ("conditioning",), ("--config.tuning=({'pattern': '.*'},)",), "but config.tuning trains 'vlm/"),
    ],
)
def test_mistakes(stage, kinds, extra, sentence, data):
    with pytest.raises(UserError, match=sentence):
        Setting(stage, data, kinds, *extra).precompute()


def test_a_folder_that_cannot_be_written(own_data):
    setting = Setting("stage1", own_data, ("targets",))
    (own_data / "index").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*index.*: name another place in config\.data\.index"):
        setting.precompute()


def test_dtypes_follow_the_networks(data):
    config = Setting("stage2", data, ("latents", "conditioning")).config
    config = dataclasses.replace(config, execution=dataclasses.replace(config.execution, compute_dtype="bfloat16"))
    made = features.empty(2, config, geometry.derive(config.model, config.data), config.data.features)
    assert (made.latents.dtype, made.text.dtype.name, made.visual.dtype.name) == (np.float32, "bfloat16", "bfloat16")
