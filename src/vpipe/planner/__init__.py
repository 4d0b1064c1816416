"""How a plan is found: what blocks take, what a cut costs, the search, estimates without a profile, explanations."""
