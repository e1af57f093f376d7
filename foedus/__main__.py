"""``python -m foedus`` is ``foedus``: the command line. Ctrl-C while it is being loaded ends it in a word, too."""

import sys


def main() -> None:
    """The entry point."""
    try:
        from foedus.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
