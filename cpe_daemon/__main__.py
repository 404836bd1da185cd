"""``python -m cpe_daemon`` is ``cpe``."""

from cpe_daemon.cli import main

if __name__ == "__main__":
    main(prog_name="cpe")
