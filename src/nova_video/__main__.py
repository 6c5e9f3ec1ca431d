"""`python -m nova_video`: the command `nova` for launchers that start modules, such as torchrun and accelerate."""

import sys

from nova_video.cli.main import main

sys.exit(main())
