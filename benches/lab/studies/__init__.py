"""Models with one property each, trained from members of the family."""
