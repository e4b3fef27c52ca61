"""Runs of one process or of several: starting them, binding them to cores and memory, ending them together.

Nothing is imported here: a process binds itself before it loads PyTorch.
"""
