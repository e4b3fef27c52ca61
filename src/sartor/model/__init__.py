"""Models: where they come from, how they are built, what they are made of."""

from sartor.model.blocks import Anatomy, Stack, choosable_blocks, choose_recomputed, dissect
from sartor.model.build import build, build_empty, build_lazily, check_trainable, skeleton
from sartor.model.quantise import quantise_skeleton, weight_bytes
from sartor.model.skeletons import outline, short_skeleton
from sartor.model.source import ModelSource, load_tokenizer, resolve, weights_folder

__all__ = [
    "Anatomy",
    "ModelSource",
    "Stack",
    "build",
    "build_empty",
    "build_lazily",
    "check_trainable",
    "choosable_blocks",
    "choose_recomputed",
    "dissect",
    "load_tokenizer",
    "outline",
    "quantise_skeleton",
    "resolve",
    "short_skeleton",
    "skeleton",
    "weight_bytes",
    "weights_folder",
]
