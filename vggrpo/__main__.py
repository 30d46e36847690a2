"""`python -m vggrpo` and the `vggrpo` command."""

import sys

from vggrpo.heap import keep_freed_memory


def main() -> None:
    """Exit with the command's status; a missing extra is one line that names it."""
    # Here, not above: the command line imports the whole stack, and `import vggrpo.__main__` need not.
    try:
        from vggrpo.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("vggrpo", "geometry", "rewards"):
            raise
        sys.exit(f"vggrpo: {error.name} is not installed: pip install 'vggrpo[train]'")
    keep_freed_memory()
    sys.exit(run())


if __name__ == "__main__":
    main()
