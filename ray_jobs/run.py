"""Entry point of a Ray job: `ray job submit --working-dir . -- python ray_jobs/run.py RECIPE [--set a.b=c]...`.

Equals `finescope run` with the ray runner, and needs no finescope installed beside what the cluster's image has.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finescope.cli import main

if __name__ == "__main__":
    sys.argv = [sys.argv[0], "run", *sys.argv[1:], "--set", "compute.runner=ray"]
    main()
