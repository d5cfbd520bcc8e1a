"""Trees of parameters: paths, selectors, partial trees, keys."""
