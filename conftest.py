"""What holds for all tests: none of them is about how long it takes, least of all on a busy machine."""

from hypothesis import settings

settings.register_profile("penstock", deadline=None)
settings.load_profile("penstock")
