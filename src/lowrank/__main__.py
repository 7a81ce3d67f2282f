"""`python -m lowrank` is the command `lowrank`."""

import sys

from lowrank.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
