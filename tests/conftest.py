"""What holds for all tests."""

from hypothesis import settings

# Examples are no measurements of time: beside an engine on the same cores any of them may be kept waiting.
settings.register_profile("beside others", deadline=None)
settings.load_profile("beside others")
