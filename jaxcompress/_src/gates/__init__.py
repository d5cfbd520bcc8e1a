"""Learned gates on units: hard concrete switches, the price of open ones, the choice at the end."""
