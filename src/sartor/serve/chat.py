"""A conversation in the terminal, streamed."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from sartor.errors import UsageError
from sartor.serve.session import Message, Sampling, Session

HELP = "/new starts over, /quit (or Ctrl-D) leaves"


def chat(session: Session, sampling: Sampling, console: Console, *, read: Callable[[str], str] = input) -> list[Message]:
    """Talk until the user leaves; returns the conversation. Raises UsageError for a model that knows no chat."""
    if not session.chat:
        raise UsageError(
            "this model was trained on plain text, it knows no turns of a conversation",
            remedy="`sartor generate RUN --prompt …` lets it continue a text",
        )
    console.print(HELP, style="dim")
    messages: list[Message] = []
    while True:
        try:
            said = read("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return messages
        if said == "/quit":
            return messages
        if said == "/new":
            messages = []
            continue
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        console.print("model: ", style="bold", end="")
        answer = ""
        try:
            for piece in session.stream(messages, sampling):
                answer += piece
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" (cut short)", style="dim", end="")
        console.print()
        messages.append({"role": "assistant", "content": answer.strip()})
