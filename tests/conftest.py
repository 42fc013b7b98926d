"""What all tests share."""

import os

from hypothesis import settings

# On CI a run must not fail by the luck of the draw; elsewhere every run looks somewhere new.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
