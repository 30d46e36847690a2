"""`python -m vggrpo` and the `vggrpo` command."""

import sys


def main() -> None:
    """Exit with the command's status."""
    # Here, not above: the command line imports the whole stack, and `import vggrpo.__main__` need not.
    from vggrpo.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
