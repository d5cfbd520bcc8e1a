"""Running an unmodified model on compressed leaves."""
