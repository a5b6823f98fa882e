"""From files to checked rows.

`read` turns bytes into JSON values with their places, `formats` says which of the known shapes a row has,
`schema` holds it to that one JSON Schema, `convert` brings it into the canonical form of `rows`, `rules`
checks what a schema cannot say, and `check` runs the chain over a file. `report` shows what was found.

Another format is three things: a branch in `formats.detect_format`, a definition under `$defs` of the schema
of its kind, and a function in `convert`.
"""
