"""The subcommands of ``featherlight``, a module each."""
