"""The pages: their code, run; their figures, from the records; their picture."""
