"""One file for each case of `scripts/benchmark.py`; `frame.py` says what a case is."""
