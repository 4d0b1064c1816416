"""How values are written and read by people: sizes, tables, names that were nearly right."""
