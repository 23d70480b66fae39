"""`python -m glmix` is the `glmix` command."""

import sys

from glmix_command import main

if __name__ == "__main__":
    sys.exit(main())
