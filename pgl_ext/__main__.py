"""Command line: ``python -m pgl_ext COMMAND``."""

from pgl_ext.tools.cli import main

if __name__ == "__main__":
    main()
