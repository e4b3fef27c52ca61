"""Trying the result: answers, streams, chats."""

from sartor.serve.chat import chat
from sartor.serve.judge import Judge
from sartor.serve.session import Sampling, Session, generate

__all__ = ["Judge", "Sampling", "Session", "chat", "generate"]
