"""A further process of a run, started by `sartor.launch.local`: binds itself before PyTorch makes its threads."""

import sys

from sartor.errors import SartorError
from sartor.launch.numa import Place, bind


def main() -> None:
    rank, size, port, place = sys.argv[1:]
    bind(Place.read(place))
    from sartor.launch.local import follow_started

    try:
        follow_started(int(rank), int(size), int(port))
    except SartorError as error:
        sys.exit(str(error))


main()
