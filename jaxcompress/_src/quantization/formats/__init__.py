"""Number formats: one file a format or a family of them; `spec.FORMATS` is the table of their names."""
