"""One self-contained HTML page about runs: what was asked, what came of it, and how sure that is.

`page` gathers and renders; `account` says what the records of a run say, `curves` and `margins` make figures of
numbers, `answers` puts generations side by side, and `loading` writes the code that opens a run. The page's own files
are in `assets`.
"""
