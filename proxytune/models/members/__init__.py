"""One model of the composition, and how several run."""
