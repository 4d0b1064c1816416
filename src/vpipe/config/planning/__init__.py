"""Between a run and its plan: the plan that it says, what it asks the planner, and the run that a plan means."""
