"""`python -m cosmos3_fast` is the command `cosmos3-fast`."""

import sys

from cosmos3_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
