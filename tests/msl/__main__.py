"""``python -m msl FILE...``: compiles Metal files and prints the path of the shared object."""

import argparse
import sys

from . import library


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="msl", description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--mode", choices=["typed", "check"], default="typed")
    parser.add_argument("-I", dest="include_dirs", action="append", default=[])
    parser.add_argument("-D", dest="defines", action="append", default=[])
    options = parser.parse_args()
    compiled = library.compile(options.files, options.mode, options.include_dirs, options.defines)
    sys.stdout.write(f"{compiled.path}\n")


if __name__ == "__main__":
    main()
