"""What holds for every test: no hub, and libraries that stay quiet. Set before any of them is imported."""

import os

from hypothesis import settings

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
)

# A busy machine is no reason for a property test to fail.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
