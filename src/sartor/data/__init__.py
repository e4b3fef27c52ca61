"""Files become conversations, conversations become tokens with a loss mask."""

from sartor.data.page import render_html, render_terminal
from sartor.data.prepare import prepare
from sartor.data.prompts import encode_prompt, prompt_and_reference, readable_prompt
from sartor.data.summary import DataSets, DataSummary, Lengths
from sartor.data.template import BUILT_IN as BUILT_IN_TEMPLATES
from sartor.data.tokens import Sample, TokenSet

__all__ = [
    "BUILT_IN_TEMPLATES",
    "DataSets",
    "DataSummary",
    "Lengths",
    "Sample",
    "TokenSet",
    "encode_prompt",
    "prepare",
    "prompt_and_reference",
    "readable_prompt",
    "render_html",
    "render_terminal",
]
