"""What each rank does, in which order. Standard library only.

A schedule is plain data: builders write it, everything else is computed from it. Read in this order: `action` (the
words), `placement` and `schedule` (the sentence), `registry` and a builder, e.g. `one_f_one_b`, then `zero_bubble` and
`zb_v`; then what is derived: `lower` (communication), `validate` (is it legal), `weights`, `memory` and `traffic` (what
it holds and sends), `costs` and `simulate` (how long it takes), `critical_path`, `idle` and `usage` (why, and what is
held when); `searched`, `search` and what that names (a better order, found); `render`, `compare`, `svg`, `chrome_trace`
and `csv_form` (how it looks, and how it is written down).
"""
