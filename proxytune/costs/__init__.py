"""What a token costs at least, before anything is measured."""
