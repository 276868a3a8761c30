"""Run the command line: `python -m qvsplit` is `qvsplit`."""

from qvsplit.cli import main

if __name__ == "__main__":
    main()
