"""What each rank does, in which order. Standard library only.

A schedule is plain data: builders write it, everything else is computed from it. Read in this order: `action`
(the words), `placement` and `schedule` (the sentence), `registry` and one builder, e.g. `one_f_one_b`; then what is
derived: `lower` (communication), `validate` (is it legal), `weights` and `memory` (what it holds), `costs` and
`simulate` (how long it takes), `render` (how it looks).
"""
