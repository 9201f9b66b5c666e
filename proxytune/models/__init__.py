"""Members, and the one model they make."""
