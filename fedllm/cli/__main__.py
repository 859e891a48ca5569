"""Lets ``python -m fedllm.cli`` do what ``fedllm`` does."""

import sys

from fedllm.cli.main import main

sys.exit(main())
