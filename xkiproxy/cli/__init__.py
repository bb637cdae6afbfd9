"""The `xkiproxy` command. Each group of commands is a module that adds itself to the app."""

from xkiproxy.cli.app import main

__all__ = ["main"]
