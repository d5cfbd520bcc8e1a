"""Array-level mathematics that several techniques share."""
