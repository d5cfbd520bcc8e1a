"""`python -m jaxcompress`: the command line."""

from jaxcompress._src.cli.main import main

main()
