"""Run folders: what each run was made of, and what it left."""
