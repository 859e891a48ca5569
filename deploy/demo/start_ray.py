"""Start Ray and stop it again, so that its programs lie in memory when Flower's simulation starts it.

Ray gives its processes 30 seconds, which cannot be set; a first start from a slow or cold disk takes longer, and Flower
then ends the run with its exit code 700. A failed attempt here has warmed the next.
"""

from __future__ import annotations

import logging
import os
import sys

os.environ.setdefault(
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
)  # otherwise Ray warns of a change that matters not here

import ray

ATTEMPTS = 4


def main() -> None:
    """Try until Ray starts once.

    Raises:
        SystemExit: It did not in any attempt.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # noqa: BLE001  # what Ray raises where a process of its own does not come up
            print(f"Ray did not start (attempt {attempt} of {ATTEMPTS}): {error}", file=sys.stderr)
        else:
            return
        finally:
            ray.shutdown()
    raise SystemExit("Ray cannot be started; its logs are under /tmp/ray/session_latest/logs.")


if __name__ == "__main__":
    main()
