"""The research lab: what trained the bundled family, and more small models for studies; never shipped.

Run from `benches/`: `python -m lab train | studies | puzzles | table`. `NOTES.md` says what was measured.

=========== ==========================================================================================================
`family`    the four small Llamas of `proxytune.demo`: corpus, tokenizer, training
`studies`   models with one property each: known forks, answers that swing with their length, a collapsed policy
`puzzles`   tasks with several solutions, all known (colouring, queens, Countdown with a scratchpad), and their models
`report`    alpha chosen on validation, figures on test
=========== ==========================================================================================================
"""
