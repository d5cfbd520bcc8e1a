"""The command line."""

from jaxcompress.cli._main import main as main
