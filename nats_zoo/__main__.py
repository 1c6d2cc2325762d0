"""`python -m nats_zoo` is the `nats` command; `accelerate launch -m nats_zoo` starts several of it."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
