"""The research lab, never shipped: it trained the bundled family, and trains more small models for studies.

Run from `benches/`: `python -m lab train | studies | puzzles | table`. `NOTES.md` has the results.

=========== ==========================================================================================================
`family`    the four small Llamas of `proxytune.demo`: corpus, tokenizer, training
`studies`   models with one property each: known forks, answers that change with their length, a collapsed policy
`puzzles`   tasks with several solutions, all known (colouring, queens, Countdown with a scratchpad), and their models
`report`    alpha chosen on validation, figures on test
=========== ==========================================================================================================
"""
