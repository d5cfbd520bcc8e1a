"""Compressed models as files of other ecosystems."""
