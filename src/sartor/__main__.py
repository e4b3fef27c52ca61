"""`python -m sartor`, by itself or as one of the processes that torchrun starts: the first runs, the others follow."""

import os
import sys

from sartor.cli import main

if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1 and sys.argv[1:2] == ["train"]:
    from sartor.launch.local import follow

    if int(os.environ["RANK"]) > 0:
        follow()
        sys.exit()
    sys.argv.append(f"strategy.processes={size}")
main()
