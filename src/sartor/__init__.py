"""Sartor fine-tunes any Hugging Face model on the machine you have: it predicts, plans, runs and reports."""

__version__ = "0.1.0"
