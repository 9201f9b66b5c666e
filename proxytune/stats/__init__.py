"""Estimators over samples; numpy only."""
