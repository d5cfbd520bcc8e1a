"""Declared pipelines on text classifiers: recipes, data, the loops that run them."""
