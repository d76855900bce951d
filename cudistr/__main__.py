"""``python -m cudistr``: the same as the console script ``cudistr``."""

import sys

from cudistr.cli import main

if __name__ == "__main__":
    sys.exit(main())
