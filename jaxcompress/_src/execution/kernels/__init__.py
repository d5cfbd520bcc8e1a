"""Implementations of products with compressed leaves, and the choice among them."""
