"""``dsconv`` and ``python -m dsconv``: the command line, which can be stopped during import, execution and exit."""

import signal
import sys

from dsconv import stopping


def main() -> None:
    """Run the command line; see :func:`dsconv.cli.main`."""
    stopping.install()
    try:
        from dsconv.cli import main as run

        run()
    except BaseException as error:
        # Modules whose import is interrupted may raise any error.
        if not isinstance(error, SystemExit) and (code := stopping.exit_code()):
            sys.exit(code)
        raise
    finally:
        # The interpreter is shutting down: there is nothing left to stop, and its exit code is set.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
