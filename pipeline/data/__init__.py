"""From files to checked rows.

`read` turns bytes into JSON values with their places, `formats` says which of the known shapes a row has,
`schema` holds it to that one JSON Schema, `convert` brings it into the canonical form of `rows`, `rules`
checks what a schema cannot say, and `check` runs the chain over a file. `report` shows what was found.

Another format is three things: a branch in `formats`, a schema in `schemas/` that `schema_files` names, and a function
in `convert`. Another kind of file is a function that yields rows, which `read` calls.
"""
