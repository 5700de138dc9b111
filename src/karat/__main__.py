"""`python -m karat` is the command `karat`; torchrun and accelerate launch start it this way."""

import sys

from karat.cli import main

sys.exit(main())
