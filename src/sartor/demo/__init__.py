"""The embedded starter: a small base model of our own making, a task with an exact answer, and the job that teaches it."""
