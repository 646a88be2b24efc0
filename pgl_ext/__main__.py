"""Command line: ``python -m pgl_ext COMMAND``."""

import sys

if __name__ == "__main__":
    try:
        from pgl_ext.tools.cli import main
    except ModuleNotFoundError as error:
        # What a command needs and is not installed is another matter.
        if error.name != "pgl_ext.tools":
            raise
        sys.exit(
            "error: this copy of pgl_ext comes with a bundle and has no commands: pip install the package pgl-ext from "
            "its repository, and run 'python -m pgl_ext ...' in another folder than the bundle's."
        )
    main()
