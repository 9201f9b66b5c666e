"""A budget for thinking."""
