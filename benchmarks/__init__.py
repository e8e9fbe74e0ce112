"""How fast and how good, against the peers and against the claims of the papers.

`make bench-training` and `make bench-quality` write `benchmarks/results/*.json`; no test runs them.
"""
