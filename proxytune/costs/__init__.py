"""What a token has to cost, before anything is measured."""
