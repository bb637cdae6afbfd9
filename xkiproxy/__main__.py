"""`python -m xkiproxy` is the `xkiproxy` command."""

from xkiproxy.cli import main

main()
