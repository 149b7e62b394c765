"""Settings of the whole suite."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# The same examples in every run: a failure in CI is a failure here. HYPOTHESIS_PROFILE=explore looks for new ones.
_slow_machine = [HealthCheck.too_slow]
settings.register_profile(
    "deterministic", derandomize=True, deadline=None, database=None, suppress_health_check=_slow_machine
)
settings.register_profile("explore", deadline=None, max_examples=500, suppress_health_check=_slow_machine)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))

# A shell that starts the suite in the background has it ignore interrupts, and its children would too; the tests of
# what an interrupt leaves behind need one that arrives.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
