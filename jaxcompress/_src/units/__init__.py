"""Units: slices of leaves that live and die together; their scores, selection, gates and removal."""
