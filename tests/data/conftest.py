"""Hypothesis without a deadline: other work on the machine may slow a single example down."""

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
