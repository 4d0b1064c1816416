"""Text into training sets, and training sets into batches.

Read in this order: `source` (what a source of batches is), `batches` and `order` (which samples make which batch),
`bert` (reading a prepared set), `prepare_bert` (making one) and what it walks through: `corpus` or `stdlib_text`,
`sentences`, `wordpiece`, `flat_text`, `pairs`, `masking`, `split_writer`, `store`.
"""
