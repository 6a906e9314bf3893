"""Published config.json files: the network that they describe has as many parameters as the original."""

import copy
import json
import math

import diffusers
import jax
import pytest
import torch
import transformers

from mmcore_jax.pretrained.model import abstract_params, open_published
from tests.pretrained.published import CONFIGS


def original(settings: dict) -> torch.nn.Module:
    settings = copy.deepcopy(settings)
    with torch.device("meta"):
        if "_class_name" in settings:
            return diffusers.SD3Transformer2DModel.from_config(settings)
        family = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        return getattr(transformers, settings["architectures"][0])(family)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count(tmp_path, name, record_property):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    published = open_published(tmp_path)
    like = abstract_params(published.family, published.config)
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(like))
    record_property("parameters", found)
    assert found == sum(parameter.numel() for parameter in original(CONFIGS[name]).parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_write_is_read_back(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    published = open_published(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(published.family.write_config(published.config, "float32")))
    assert open_published(tmp_path).config == published.config
