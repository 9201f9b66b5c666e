"""One member of the composition, and how several run together."""
