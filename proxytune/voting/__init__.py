"""From samples to an answer; numpy only."""
