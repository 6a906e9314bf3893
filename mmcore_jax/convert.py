"""Converts checkpoints: published ones into ours, and what we have trained into published ones.

    python -m mmcore_jax.convert --from Qwen2.5-VL-3B-Instruct --to checkpoints/qwen
    python -m mmcore_jax.convert --from runs/stage1-openmoji --part vlm --to exported

What is written on the way in is what `config.init` can name; on the way out, what `from_pretrained` opens: with LoRA
merged, or, with `--adapter`, of LoRA alone and as PEFT has it.
"""

import argparse
import importlib.util
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from mmcore_jax import pretrained
from mmcore_jax.config import QwenVL, UserError, door, split_step
from mmcore_jax.data.text import copy_tokenizer, token_ids
from mmcore_jax.nn.layers import is_lora
from mmcore_jax.training.weights import load_lora, load_part, save_part


@door
def main(argv: Sequence[str]) -> None:
    """Reads the command line, converts, and compares if asked to."""
    arguments = _parser().parse_args(argv)
    source, target = arguments.source, arguments.to
    pretrained.check_new(target)
    if arguments.verify:
        check_originals()
    if arguments.adapter:
        export_adapter(source, arguments.part, target, arguments.dtype)
        return
    directory, step = split_step(source)
    if step is None and pretrained.is_published(directory):
        loaded = pretrained.load(source, dtype=arguments.dtype, component=arguments.component)
        config, params, published = loaded.config, loaded.params, loaded.settings.file.parent
        save_part(target, loaded.family.part, config, params)
    else:
        config, params = load_part(source, arguments.part)
        published, tokenizer = target, directory / "tokenizer"
        has_tokenizer = isinstance(config, QwenVL) and tokenizer.is_dir()
        settings = token_ids(tokenizer) if has_tokenizer else None
        pretrained.export(params, config, published, arguments.dtype, settings=settings)
        if has_tokenizer:
            copy_tokenizer(tokenizer, published)
    count = sum(leaf.size for path, leaf in flatten_dict(params, sep="/").items() if not is_lora(path))
    print(f"{target}: {pretrained.family_of(config).name}, {count:,} parameters")
    if arguments.verify:
        verify(published)


def export_adapter(source: pathlib.Path, part: str | None, target: pathlib.Path, dtype: str | None) -> None:
    """Writes the LoRA of a part of a run, and prints what it belongs on."""
    config, params, base = load_lora(source, part)
    pretrained.export_adapter(params, config, target, base, dtype)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{target}: LoRA of {pretrained.family_of(config).name}, {count:,} parameters, for the weights of {base}")


def verify(directory: pathlib.Path) -> None:
    """Prints how far our outputs are from the original's, on random input."""
    loaded = pretrained.load(directory)
    for label, ours, theirs in loaded.family.comparisons(loaded, directory):
        absolute = np.abs(np.asarray(ours, np.float32) - theirs).max()
        relative = absolute / np.abs(theirs).max()
        print(f"{label}: largest difference {absolute:.3g}, {relative:.3g} of the largest value")


def check_originals() -> None:
    """Raises `UserError` unless the original implementations are installed."""
    for name in ("torch", "transformers", "diffusers"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--verify runs the original, which needs {name}: pip install 'mmcore_jax[test]'.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmcore_jax.convert", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--from",
        dest="source",
        type=pathlib.Path,
        required=True,
        help="a published checkpoint or pipeline, the workdir of a finished run, WORKDIR@STEP for a checkpoint of any, "
        "or what this door has written",
    )
    parser.add_argument("--to", type=pathlib.Path, required=True, help="a directory to be made")
    parser.add_argument("--part", help="of a run: vlm, vision_target, dit")
    parser.add_argument("--component", help="of a pipeline: transformer, vae")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: what is stored")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--adapter", action="store_true", help="of a run with LoRA: write that alone, for PEFT")
    kinds.add_argument("--verify", action="store_true", help="compare outputs with the original implementation")
    return parser


if __name__ == "__main__":
    main()
