"""Compressed leaves: what is stored, and how the plain array comes back."""
