"""`python -m jaxcompress`: the command line."""

from jaxcompress.cli import main

main()
