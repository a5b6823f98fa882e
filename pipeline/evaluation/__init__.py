"""What a model answers, whether the answers hold, and how far training moved it.

`compare` runs the whole; `generation`, `checks` and `preference` measure, `intervals` says how sure the
figures are, `results` is the file that keeps them, and `table` shows them to a person.
"""
