"""What pictures are worth: features of frozen networks, and the numbers made of them.

`registry.make` gives the metrics of some names as one `scores.Scores`; beneath it are functions of
arrays (`frechet`, `kernel`, `manifold`, ...), which know no network. docs/scores.md says what each
number is and with what it may be compared.
"""
