"""``python -m featherlight`` is the ``featherlight`` command."""

from featherlight.cli import main

main()
